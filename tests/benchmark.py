"""
How fast this implementation is, compared with the reference's classes on the same machine:

    python tests/benchmark.py                            everything below; takes minutes on two CPU cores
    python tests/benchmark.py --only train generate      only these parts

    train       a training step of Stages A, B and C: forward, backward, clipping the gradient, AdamW
    generate    the whole way from captions to images
    stages      each stage of train.py as a user calls it, images per second
    v2          (CUDA only) the published sizes: training Stage C, compiled; generating at 1024 px

All but v2 use the networks of the preset "tiny"; a step of `train` takes twice as many images as its recipe.

The reference is diffusers, with transformers; where they are missing, only our side is timed. The sides take turns, so
that whatever else slows the machine slows both. Times, and ratios of times, are medians over the turns. Each side is
timed in float32 and, where the machine has it, in bfloat16; on a CPU, in each of them with PyTorch's fused attention
and with the plain one (softmax(q·kᵀ/√d)·v, product by product). The fastest combination counts. OMP_NUM_THREADS sets
the number of CPU threads.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from tokenizer import Tokenizer  # noqa: E402
from train import computing, pick_precision, read_log  # noqa: E402
from wuerstchen import PRESETS, VQGAN, StageB, StageC, Wuerstchen, diffusion_loss  # noqa: E402

try:
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.pipelines.deprecated import wuerstchen as reference
    from transformers import BatchEncoding, CLIPTextConfig, CLIPTextModel
except ImportError:
    reference = None

CONFIG = PRESETS["tiny"]
CAPTION = "a big red circle to the left of a small blue square"


class Bench:
    """Times functions on a device. device: "cpu" or "cuda"; rounds: how many timed turns each median is over"""

    def __init__(self, device, rounds):
        self.device, self.rounds = device, rounds
        self.precisions = ["float32", "bfloat16"] if pick_precision(device) == "bfloat16" else ["float32"]
        # (precision, whether attention is plain), as `computing` takes them
        self.ways = list(itertools.product(self.precisions, (False, True) if device == "cpu" else (False,)))
        n = 8192 if device == "cuda" else 1536
        matrices = {name: torch.randn(n, n, device=device, dtype=getattr(torch, name)) for name in self.precisions}
        taken = self.alternate({name: partial(torch.matmul, x, x) for name, x in matrices.items()})
        self.rates = {name: 2 * n**3 / times.median().item() for name, times in taken.items()}  # FLOP/s
        print("matrix products: " + ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.rates.items()))

    def alternate(self, sides):
        """sides {name: function}: calls them in turn, after two warm-up rounds -> {name: its seconds, turn by turn}"""
        seconds = torch.empty(2 + self.rounds, len(sides))
        for turn in seconds:
            for i, run in enumerate(sides.values()):
                start = time.perf_counter()
                run()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                turn[i] = time.perf_counter() - start
        return dict(zip(sides, seconds[2:].T))

    def compare(self, what, images, ours, theirs=None):
        """Times our function and the reference's, and prints the result. Both take one of self.ways.
        what: headline; images: how many one call handles; theirs: None without a reference"""
        works, best = {"ours": ours} | ({"reference": theirs} if theirs else {}), {}
        taken = self.alternate({(side, way): partial(work, way) for side, work in works.items() for way in self.ways})
        print(f"\n{what}")
        for side, work in works.items():
            precision, plain = way = min(self.ways, key=lambda way: taken[side, way].median())
            best[side] = taken[side, way]
            with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
                work((precision, self.ways[-1][1]))  # the counter misses the fused kernel on a CPU
            took = best[side].median().item()
            rate = counter.get_total_flops() / took
            print(f"  {side:9} {took * 1e3:9.1f} ms in {precision}, {'plain' if plain else 'fused'} attention, "
                  f"{images / took:7.1f} images/s, "
                  f"{rate / 1e9:7,.0f} GFLOP/s = {rate / self.rates[precision]:3.0%} of matrix products", flush=True)
        if theirs:
            print(f"  {(best['reference'] / best['ours']).median():.2f} times as fast as the reference", flush=True)


def training_step(bench, network, loss_of):
    """network: to be trained; loss_of(): the loss, a scalar -> a function for `Bench.compare` that takes one step"""
    network.to(bench.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step(way):
        optimizer.zero_grad()
        with computing(bench.device, *way):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return step


def diffusion_step(bench, network, *shapes):
    """`training_step` for Stage B or C. shapes: of the noisy latents and of each condition"""
    x, *conditions = [torch.randn(shape, device=bench.device) for shape in shapes]
    noise, t = torch.randn_like(x), torch.rand(len(x), device=bench.device)
    return training_step(bench, network, lambda: diffusion_loss(noise, network(x, t, *conditions), t).mean())


def reference_networks(config):
    """-> the reference's Stages A, B and C with the sizes of a Config"""
    a, b, c = config.a, config.b, config.c
    return (reference.PaellaVQModel(embed_dim=a.channels[-1], bottleneck_blocks=a.blocks,
                                    num_vq_embeddings=a.codebook_size, scale_factor=a.scale),
            reference.WuerstchenDiffNeXt(
                c_hidden=list(b.channels), blocks=list(b.blocks), nhead=[heads or -1 for heads in b.heads],
                level_config=["CTA" if heads else "CT" for heads in b.heads], inject_effnet=list(b.sees_semantic),
                c_cond=b.cond_width, clip_embd=config.text_b.width, dropout=b.dropout),
            reference.WuerstchenPrior(c_in=config.semantic_channels, c=c.width, c_cond=config.text_c.width,
                                      c_r=config.time_width, depth=c.depth, nhead=c.heads, dropout=c.dropout))


def reference_generate(config, tokenizer, dtype):
    """-> the reference's `Wuerstchen.generate`, for copies of one caption. dtype: of the weights"""
    def tokenize(texts, **options):
        return BatchEncoding(dict(zip(("input_ids", "attention_mask"), tokenizer(texts))))
    tokenize.model_max_length = tokenizer.length
    networks = *reference_networks(config), *(CLIPTextModel(CLIPTextConfig(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.length, hidden_size=cfg.width, hidden_act="gelu",
        num_hidden_layers=cfg.depth, num_attention_heads=cfg.heads,
        intermediate_size=cfg.mlp_width)) for cfg in (config.text_c, config.text_b))
    a, b, c, text, text_b = (nn.Module.to(network.eval(), dtype) for network in networks)  # diffusers' own `to` warns
    prior = reference.WuerstchenPriorPipeline(tokenize, text, c, DDPMWuerstchenScheduler())
    decoder = reference.WuerstchenDecoderPipeline(tokenize, text_b, b, DDPMWuerstchenScheduler(), a)
    prior.set_progress_bar_config(disable=True)
    decoder.set_progress_bar_config(disable=True)

    def generate(prompts):
        semantic = prior(prompts[0], config.image_size, config.image_size, num_inference_steps=60, guidance_scale=4.0,
                         num_images_per_prompt=len(prompts)).image_embeddings
        decoder(semantic, prompts[0], num_inference_steps=12, guidance_scale=0.0, output_type="pt")
    return generate


def train(bench):
    """A training step of each stage with the sizes of CONFIG, on random images and latents."""
    a, (ra, rb, rc) = VQGAN(CONFIG), reference_networks(CONFIG) if reference else (None, None, None)
    images, text = torch.rand(128, 32, 32, 3, device=bench.device), (CONFIG.text_c.length, CONFIG.text_c.width)
    images_first = images.permute(0, 3, 1, 2).contiguous()  # the reference has channels first

    def loss_a():
        reconstruction, _, _, vq_loss = a(images)
        return nn.functional.mse_loss(reconstruction, images) + vq_loss

    def reference_loss_a():
        quantized, vq_loss, _ = ra.vquantizer(ra.encode(images_first).latents)
        return nn.functional.mse_loss(ra.decode(quantized).sample, images_first) + vq_loss

    bench.compare("Training step of Stage A, 128 crops of 32 px, no discriminator", 128,
                  training_step(bench, a, loss_a), ra and training_step(bench, ra, reference_loss_a))
    bench.compare("Training step of Stage B, 32 latents of 32x32", 32,
                  diffusion_step(bench, StageB(CONFIG), (32, 32, 32, 4), (32, 3, 3, 16), (32, *text)),
                  rb and diffusion_step(bench, rb, (32, 4, 32, 32), (32, 16, 3, 3), (32, *text)))
    bench.compare("Training step of Stage C, 128 semantic latents of 3x3", 128,
                  diffusion_step(bench, StageC(CONFIG), (128, 3, 3, 16), (128, *text)),
                  rc and diffusion_step(bench, rc, (128, 16, 3, 3), (128, *text)))


def generate(bench, config=CONFIG, counts=(1, 8), dtype=torch.float32):
    """Images of one caption, with random weights. counts: images per run; dtype: of the weights"""
    tokenizer = Tokenizer.train([CAPTION] * 2, length=config.text_c.length)
    with torch.device(bench.device):
        ours = partial(Wuerstchen(config, tokenizer).eval().to(dtype).generate, steps=(60, 12))
        theirs = reference and reference_generate(config, tokenizer, dtype)

    def run(side, count, way):
        with computing(bench.device, *way):
            side([CAPTION] * count)

    for count in counts:
        bench.compare(f"generate, {count} at {config.image_size} px, 60 steps of C with guidance, 12 of B", count,
                      partial(run, ours, count), theirs and partial(run, theirs, count))


def stages(bench):
    """A few steps of each stage of the default run, with the batch sizes of its recipe."""
    with tempfile.TemporaryDirectory() as folder:
        command = "train.py", "--run", folder, "--device", bench.device, "--steps=12", "--log-every=2", "--cache=256"
        subprocess.run([sys.executable, *command], cwd=Path(__file__).parent.parent, check=True, capture_output=True)
        lines = read_log(Path(folder))
    print("\ntrain.py, preset tiny")
    for stage in ("text", "a", "b", "c"):
        # Logged speeds are means from step 0 on. The first steps are a warm-up: measure from the first logged one on.
        (first, rate), *_, (last, last_rate) = [(line["step"], line["images_per_s"]) for line in lines
                                                if line["stage"] == stage and "images_per_s" in line]
        print(f"  {stage:5} {(last - first) / (last / last_rate - first / rate):7.1f} images/s", flush=True)


def v2(bench):
    """The published sizes, which need a large GPU. For the training step, Stage C is compiled as a whole."""
    bench.precisions, config, c = ["bfloat16"], PRESETS["v2"], StageC(PRESETS["v2"])
    c.compile()
    bench.compare("Training step of Stage C v2, compiled, 64 semantic latents of 24x24", 64,
                  diffusion_step(bench, c, (64, 24, 24, 16), (64, 77, config.text_c.width)))
    print(f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most, on {torch.cuda.get_device_name()}")
    generate(bench, config, counts=(1, 4), dtype=torch.bfloat16)


if __name__ == "__main__":
    parts = {"train": train, "generate": generate, "stages": stages, "v2": v2}
    parser = argparse.ArgumentParser(description="Times this implementation against the reference's classes.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=parts,
                        help="what to measure (default: all that the device can run)")
    parser.add_argument("--rounds", type=int, default=9, help="turns per median (default: 9)")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, for both sides
    torch.manual_seed(0)
    bench = Bench(args.device, args.rounds)
    if reference is None:
        print("diffusers and transformers are not installed: only our side is timed")
    chosen = args.only or [name for name in parts if name != "v2" or args.device == "cuda"]
    for name in sorted(chosen, key=list(parts).index):  # v2 comes last: it changes the precisions
        parts[name](bench)
