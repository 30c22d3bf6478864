"""
How fast this is, beside the reference's classes on the same machine:

    python tests/benchmark.py                            all that follows; minutes on two CPU cores
    python tests/benchmark.py --only train generate      some of it
    python tests/benchmark.py --device cuda              on a GPU, with the published sizes at the end

    train       a training step of stages A, B and C: forward, backward, clipping the gradient, AdamW
    generate    captions to pictures, all of it, with the networks of the preset "tiny"
    cache       Stage C's training on what was computed once, against making pictures, latents and text in every step
    stages      each stage of train.py, pictures a second
    v2          (CUDA only) training the published Stage C, compiled; drawing at 1024 px

The reference is diffusers, where that package (and transformers, which it wants) is installed; nothing else in the
project needs them. Without, only our side is timed. The sides take turns, so that whatever else slows the machine slows
both; times, and ratios of times, are the medians of the turns. Of float32 and bfloat16 (autocast) each side is shown
with its faster one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
from tokenizer import Tokenizer  # noqa: E402
from train import Batches, Shapes  # noqa: E402
from wuerstchen import (PRESETS, VQGAN, CompressorConfig, SemanticCompressor, StageB, StageBConfig,  # noqa: E402
                        StageC, StageCConfig, TextEncoder, VQGANConfig, Wuerstchen, diffusion_loss, shrink)

try:
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.pipelines.deprecated import wuerstchen as reference
    from transformers import CLIPTextConfig, CLIPTextModel
except ImportError:
    reference = None

A = VQGANConfig(channels=(32, 64), blocks=4, codebook_size=1024)
B = StageBConfig(channels=(64, 128, 256), blocks=(2, 2, 4), heads=(0, 4, 8), semantic=(False, True, True),
                 cond_width=128, text_width=128, dropout=0.1)
C = StageCConfig(width=256, depth=6, heads=4, text_width=128, dropout=0.1)
CAPTION = "a big red circle to the left of a small blue square"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 FLOP/s as published, without sparsity


# ----------------------------------------------------------------------------------------------------------------------
# Measuring. A `work` is a function that computes something, work(precision), to be timed.


def ratio(slow, fast):
    """How many times as long one side took as the other, turn by turn -> median"""
    return median(a / b for a, b in zip(slow, fast))


class Bench:
    """The options, and what the machine multiplies at best."""

    def __init__(self, device, rounds):
        self.device, self.rounds = device, rounds
        n = 8192 if device == "cuda" else 1536
        matrices = {name: torch.randn(n, n, device=device).to(dtype) for name, dtype in PRECISIONS.items()}
        taken = self.alternate({name: partial(torch.matmul, x, x) for name, x in matrices.items()})
        self.rates = {name: 2 * n**3 / median(times) for name, times in taken.items()}
        print("matrix products: " + ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.rates.items()))

    def autocast(self, precision):
        return torch.autocast(self.device, torch.bfloat16, enabled=precision == "bfloat16")

    def seconds(self, run):
        start = time.perf_counter()
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def alternate(self, sides):
        """sides {name: function}: each in turn, after two rounds to warm up -> {name: its seconds, turn by turn}"""
        times = [[self.seconds(run) for run in sides.values()] for _ in range(2 + self.rounds)]
        return dict(zip(sides, zip(*times[2:])))

    def look_inside(self, run):
        """Profiles one run -> bytes it takes at most beyond what was there before, [(operator, share of the time)]"""
        on_gpu = self.device == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with profile(activities=activities, profile_memory=not on_gpu, acc_events=True) as record:
            self.seconds(run)
        if on_gpu:
            most = torch.cuda.max_memory_allocated() - before
        else:  # the exported trace has the sum after every single allocation
            with tempfile.TemporaryDirectory() as folder:
                record.export_chrome_trace(f"{folder}/trace.json")
                events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
            most = max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")
        taken = {event.key.removeprefix("aten::"): event.self_device_time_total if on_gpu else event.self_cpu_time_total
                 for event in record.key_averages()}
        top = sorted(taken, key=taken.get, reverse=True)[:8]
        return most, [(name, taken[name] / sum(taken.values())) for name in top]

    def compare(self, what, pictures, ours, theirs):
        """Times two works, `theirs` None without a reference, and prints what came out. pictures: in one run"""
        works = {"ours": ours} | ({"reference": theirs} if theirs else {})
        taken = self.alternate({(side, precision): partial(work, precision)
                                for side, work in works.items() for precision in PRECISIONS})
        print(f"\n{what}")
        best, tops = {}, {}
        for side, work in works.items():
            precision = min(PRECISIONS, key=lambda precision: median(taken[side, precision]))
            best[side] = taken[side, precision]
            took = median(best[side])
            with FlopCounterMode(display=False) as counter:
                work(precision)
            rate = counter.get_total_flops() / took
            most, tops[side] = self.look_inside(partial(work, precision))
            other = next(name for name in PRECISIONS if name != precision)
            slower = median(taken[side, other])
            print(f"  {side:9} {took * 1e3:9.1f} ms in {precision} ({slower * 1e3:.1f} in {other}), "
                  f"{pictures / took:7.1f} pictures/s, {rate / 1e9:7,.0f} GFLOP/s = "
                  f"{rate / self.rates[precision]:3.0%} of matrix products, {most / 2**20:,.0f} MB")
        if theirs:
            print(f"  {ratio(best['reference'], best['ours']):.2f} times as fast as the reference")
        for side, top in tops.items():
            print(f"  {side:9} spends " + ", ".join(f"{share:.0%} {name}" for name, share in top), flush=True)


def training_step(bench, network, loss_of):
    """A work: one step. loss_of() -> scalar"""
    network.to(bench.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step(precision):
        optimizer.zero_grad()
        with bench.autocast(precision):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
        optimizer.step()
    return step


def channels_first(x):
    """As the reference wants it. (B, H, W, C) -> (B, C, H, W)"""
    return x.permute(0, 3, 1, 2).contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# The reference's networks in our sizes.


def reference_a(cfg):
    return reference.PaellaVQModel(embed_dim=cfg.channels[-1], bottleneck_blocks=cfg.blocks,
                                   num_vq_embeddings=cfg.codebook_size, scale_factor=cfg.scale)


def reference_b(cfg):
    return reference.WuerstchenDiffNeXt(
        c_hidden=list(cfg.channels), blocks=list(cfg.blocks), nhead=[heads or -1 for heads in cfg.heads],
        level_config=["CTA" if heads else "CT" for heads in cfg.heads], inject_effnet=list(cfg.semantic),
        c_cond=cfg.cond_width, clip_embd=cfg.text_width, dropout=cfg.dropout)


def reference_c(cfg):
    return reference.WuerstchenPrior(c_in=cfg.channels, c=cfg.width, c_cond=cfg.text_width, c_r=cfg.time_width,
                                     depth=cfg.depth, nhead=cfg.heads, dropout=cfg.dropout)


def reference_text(cfg):
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.length, hidden_size=cfg.width, hidden_act=cfg.activation,
        num_hidden_layers=cfg.depth, num_attention_heads=cfg.heads, intermediate_size=cfg.mlp_width))


def reference_pipelines(config, tokenizer):
    """Text to semantic latents, and those to pictures."""
    def tokenize(texts, **options):
        ids, mask = tokenizer(texts)
        return SimpleNamespace(input_ids=ids, attention_mask=mask)

    tokenize.model_max_length = tokenizer.length
    prior = reference.WuerstchenPriorPipeline(tokenize, reference_text(config.text), reference_c(config.c),
                                              DDPMWuerstchenScheduler())
    decoder = reference.WuerstchenDecoderPipeline(tokenize, reference_text(config.text_b), reference_b(config.b),
                                                  DDPMWuerstchenScheduler(), reference_a(config.a))
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval()
    return prior, decoder


# ----------------------------------------------------------------------------------------------------------------------
# What is measured.


def train(bench):
    random = partial(torch.randn, device=bench.device)

    images = torch.rand(32, 128, 128, 3, device=bench.device)
    a, images_first = VQGAN(A), channels_first(images)

    def loss_a():
        reconstruction, _, _, vq_loss = a(images)
        return F.mse_loss(reconstruction, images) + vq_loss

    if reference:
        ra = reference_a(A)

        def reference_loss_a():
            quantized, vq_loss, _ = ra.vquantizer(ra.encode(images_first).latents)
            return F.mse_loss(ra.decode(quantized).sample, images_first) + vq_loss

    bench.compare("Training step of Stage A, 32 pictures of 128 px, no discriminator", 32,
                  training_step(bench, a, loss_a), training_step(bench, ra, reference_loss_a) if reference else None)

    x, noise, t = random(32, 32, 32, 4), random(32, 32, 32, 4), torch.rand(32, device=bench.device)
    semantic, text = random(32, 3, 3, 16), random(32, 24, B.text_width)
    bench.compare("Training step of Stage B, 32 latents of 32x32", 32, *both_steps(
        bench, StageB(B), reference and reference_b(B), x, noise, t, dict(effnet=semantic, clip=text)))

    x, noise, t = random(256, 3, 3, 16), random(256, 3, 3, 16), torch.rand(256, device=bench.device)
    bench.compare("Training step of Stage C, 256 semantic latents of 3x3", 256, *both_steps(
        bench, StageC(C), reference and reference_c(C), x, noise, t, dict(c=random(256, 24, C.text_width))))


def both_steps(bench, network, theirs, x, noise, t, conditions):
    """Works for the training steps of our Stage B or C and of the reference's, None without one. conditions: the
    network's other inputs by the reference's names, in the order of ours"""
    ours = training_step(bench, network, lambda: diffusion_loss(noise, network(x, t, *conditions.values()), t))
    if theirs is None:
        return ours, None
    first = [channels_first(y) if y.dim() == 4 else y for y in (x, noise, *conditions.values())]
    named = dict(zip(conditions, first[2:]))
    return ours, training_step(bench, theirs, lambda: diffusion_loss(first[1], theirs(first[0], r=t, **named), t))


def generate(bench, config=PRESETS["tiny"], counts=(1, 8), dtype=torch.float32):
    """Ours beside the two pipelines: the same sizes, steps and guidance, random weights."""
    tokenizer = Tokenizer.train([CAPTION] * 2, length=config.text.length)
    with torch.device(bench.device):
        model = Wuerstchen(config, tokenizer).eval()
        pipelines = reference_pipelines(config, tokenizer) if reference else ()
    for network in [model] + [part for pipeline in pipelines for part in pipeline.components.values()]:
        if isinstance(network, nn.Module):
            # Half-precision weights: ours keeps vectors exact, as it does with the hub's; theirs is all of one kind.
            for p in network.parameters():
                p.data = p.data.to(dtype) if p.dim() > 1 or network is not model else p.data
            for b in network.buffers():
                b.data = b.data.to(dtype) if b.is_floating_point() and network is not model else b.data

    def ours(count, precision):
        with bench.autocast(precision):
            model.generate([CAPTION] * count)

    def theirs(count, precision):
        prior, decoder = pipelines
        with bench.autocast(precision):
            semantic = prior(CAPTION, height=config.image_size, width=config.image_size, num_inference_steps=60,
                             guidance_scale=4.0, num_images_per_prompt=count).image_embeddings
            decoder(semantic, CAPTION, num_inference_steps=12, guidance_scale=0.0, output_type="pt")

    for count in counts:
        bench.compare(f"generate, {count} at {config.image_size} px, 60 steps of C with guidance, 12 of B", count,
                      partial(ours, count), partial(theirs, count) if reference else None)


def cache(bench):
    """Stage C's training step on semantic latents and text that were computed once, as with --freeze-text, and without
    a cache: the pictures made (those of Shapes, drawn), shrunk and compressed, the captions tokenized and encoded, with
    the small compressor of "tiny", and with the published one."""
    count, device = 256, bench.device
    c, cfg = StageC(C), PRESETS["tiny"].text
    shapes = Shapes(128)
    tokenizer = Tokenizer.train(shapes.captions(2000), length=cfg.length)
    batches = iter(Batches(shapes, count, first=0, steps=sys.maxsize, rank=0, ranks=1))
    t, noise = torch.rand(count, device=device), torch.randn(count, 3, 3, 16, device=device)
    semantic, text = torch.randn(4096, 3, 3, 16), torch.randn(4096, cfg.length, cfg.width).half()
    held = SimpleNamespace()
    step = training_step(bench, c, lambda: diffusion_loss(noise, c(held.x, t, held.text), t))
    encoder = TextEncoder(cfg).to(device).eval()

    def from_cache(precision):
        rows = torch.randint(len(semantic), (count,))
        held.x, held.text = semantic[rows].to(device), text[rows].to(device).float()
        step(precision)

    def on_the_fly(compressor, precision):
        images, captions, _ = next(batches)
        with torch.no_grad(), bench.autocast(precision):
            held.x = torch.cat([compressor(shrink(some.to(device) / 255)).float() for some in images.split(64)])
            held.text = encoder(*(y.to(device) for y in tokenizer(captions))).float()
        step(precision)

    works = {"from the cache": from_cache}
    for name, sizes in (("tiny", PRESETS["tiny"].compressor), ("published", CompressorConfig())):
        compressor = SemanticCompressor(sizes).to(device).eval()
        works[f"on the fly, compressor {name}"] = partial(on_the_fly, compressor)
    taken = bench.alternate({(name, precision): partial(work, precision)
                             for name, work in works.items() for precision in PRECISIONS})
    best = {name: min((taken[name, precision] for precision in PRECISIONS), key=median) for name in works}
    print(f"\nTraining Stage C, {count} pictures of 128 px a step")
    for name, times in best.items():
        print(f"  {name:32} {count / median(times):7.0f} pictures/s, the cache is "
              f"{ratio(times, best['from the cache']):.1f} times as fast", flush=True)


def stages(bench):
    """train.py as a user calls it, a few steps of each stage of the default run."""
    print("\ntrain.py, preset tiny, batch sizes of its recipe")
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("tokenizer", "text", "a", "b", "c"):
            command = [sys.executable, "train.py", stage, "--run", folder, "--steps", "12", "--log-every", "2",
                       "--cache", "256", "--device", bench.device]
            subprocess.run(command, cwd=HERE, check=True, capture_output=True)
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    for stage in ("text", "a", "b", "c"):
        # The first steps warm up, so the speed is that between the first line and the last.
        first, *_, last = (line for line in lines if line["stage"] == stage and "images_per_s" in line)
        batch = last["images_per_s"] * last["seconds"] / last["step"]
        speed = batch * (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
        print(f"  {stage:5} {speed:7.1f} pictures/s", flush=True)


def v2(bench):
    """The published sizes, which want a large GPU. The training step of Stage C is compiled as a whole."""
    c, count = StageC(StageCConfig()), 64
    x, noise = (torch.randn(count, 24, 24, 16, device="cuda") for _ in range(2))
    t, text = torch.rand(count, device="cuda"), torch.randn(count, 77, StageCConfig().text_width, device="cuda")
    plain = training_step(bench, c, lambda: diffusion_loss(noise, c(x, t, text), t))
    with FlopCounterMode(display=False) as counter:
        plain("bfloat16")
    compiled = torch.compile(c)
    step = training_step(bench, c, lambda: diffusion_loss(noise, compiled(x, t, text), t))
    most, top = bench.look_inside(lambda: step("bfloat16"))
    took = median(bench.alternate({"step": lambda: step("bfloat16")})["step"])
    rate, name = counter.get_total_flops() / took, torch.cuda.get_device_name()
    peak = next((value for card, value in PEAK.items() if card in name), None)
    print(f"\nTraining step of Stage C v2, {count} semantic latents of 24x24, bfloat16, compiled, on {name}\n"
          f"  {took * 1e3:.1f} ms, {count / took:.1f} pictures/s, {rate / 1e12:.0f} TFLOP/s = "
          f"{rate / bench.rates['bfloat16']:.0%} of matrix products"
          + (f", {rate / peak:.0%} of the published peak" if peak else "") + f", {most / 2**30:.1f} GB")
    print("  spends " + ", ".join(f"{share:.0%} {name}" for name, share in top), flush=True)
    del c, compiled, plain, step
    generate(bench, PRESETS["v2"], counts=(1, 4), dtype=torch.bfloat16)


PARTS = {"train": train, "generate": generate, "cache": cache, "stages": stages, "v2": v2}


def main():
    parser = argparse.ArgumentParser(description="Times this implementation beside the reference's classes.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=PARTS, help="what to measure (default: all that the device can)")
    parser.add_argument("--rounds", type=int, default=9, help="turns that a median is taken of (default: 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for both sides
    torch.manual_seed(0)
    bench = Bench(args.device, args.rounds)
    if reference is None:
        print("diffusers and transformers are not installed: only our side is timed")
    for name in args.only or [name for name in PARTS if name != "v2" or args.device == "cuda"]:
        PARTS[name](bench)


if __name__ == "__main__":
    main()
