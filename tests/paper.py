"""
The paper's claims, measured in miniature on Shapes. All but `compression` start from a finished default run
(python train.py):

    python tests/paper.py baseline       Stage C on a trained B, against one U-Net on Stage A's latents (section 4, E.4)
    python tests/paper.py speed          seconds per image, by batch and image size (figure 4)
    python tests/paper.py compression    what is lost with 4x4, 2x2 and 1x1 semantic cells (section 3.4)
    python tests/paper.py stages         Stage C's latents decoded without Stage B (appendix D)
    python tests/paper.py size           steps that Stage C needs at another size, from trained weights and from none

Each takes at most half an hour on two CPU cores and writes tests/paper/NAME.json, with a chart or a sheet of images
beside it. Everything is seeded. Networks are trained by train.py's own stages, in runs/paper_*.
"""

import argparse
import contextlib
import copy
import json
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

HERE = Path(__file__).parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]

import train  # noqa: E402
import wuerstchen  # noqa: E402
from sample import make_chart, make_sheet  # noqa: E402
from score import check_all, frechet, in_batches, psnr  # noqa: E402
from wuerstchen import (CLIP, PRESETS, Config, StageB, Wuerstchen, add_noise, diffusion_loss, generators,  # noqa: E402
                        normal_noise, sample, timesteps)

OUT = HERE / "tests" / "paper"


def write(name, results, image):
    """Prints results; writes them, and an image, to OUT."""
    OUT.mkdir(exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    print(text)
    (OUT / f"{name}.json").write_text(text + "\n", "utf-8")
    image.save(OUT / f"{name}.png")


def start_run(args, name, files, image_size=None):
    """A new run with some stages of the default run, for another image size if one is given -> its folder"""
    source, folder = Path(args.run), Path(args.run).parent / f"paper_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "tokenizer", folder / "tokenizer")
    for file in files:
        shutil.copy(source / file, folder)
    for file in ("config.json", "options.json"):
        sizes = json.loads((source / file).read_text())
        sizes["image_size"] = image_size or sizes["image_size"]
        (folder / file).write_text(json.dumps(sizes))
    return folder


def logged(folder, stage):
    """A stage's lines of metrics.jsonl."""
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == stage]


def test_set(count, size=128):
    """-> images (count, size, size, 3) in [0, 1] and captions that were never trained on"""
    images, captions = zip(*(train.Shapes(size, split="test")[i] for i in range(count)))
    return torch.stack([torch.from_numpy(image) for image in images]) / 255, list(captions)


def draw(model, captions):
    """An image for each caption, by all three stages, with the seeds 0, 1, ..."""
    return in_batches(lambda some, seeds: model.generate(some, guidance=(2.0, 1.0), seed=seeds),
                      captions, list(range(len(captions))))


# ----------------------------------------------------------------------------------------------------------------------
# The baseline: one text-conditional U-Net on Stage A's latents, with as many parameters as Stages B and C together.


def make_baseline(config):
    """Stage B's network without semantic latents. What it has more than Stage B is in its lower levels, where a
    parameter costs least time."""
    config = copy.deepcopy(config)
    config.b.channels, config.b.sees_semantic = (64, 192, 240), (False,) * 3
    return StageB(config)


def draw_baseline(model, network, text_encoder, captions, seeds, steps=30, guidance=2.0):
    """captions: list of B, seeds: list of B -> images (B, H, W, 3)"""
    ids, mask = model.tokenizer(captions + [""] * len(captions))
    side, generator = model.config.image_size // 4, generators(seeds, len(captions))
    conditions = network.encode_conditions(None, text_encoder(ids, mask), (side, side))
    x = normal_noise((len(captions), side, side, model.config.latent_channels), generator, "cpu")
    latents = sample(network.predict_eps, x, timesteps(steps, "cpu"), conditions, guidance, generator)
    return model.a.decode(latents * model.a.scale).clamp(0, 1)


def train_baseline(folder, steps):
    """As Stages B and C are trained: from Stage B the recipe and the times, from Stage C the text encoder that goes on
    learning and the 5 % of dropped captions."""
    parser = train.make_parser()
    parser.set_defaults(**train.read_options(folder), device="cpu", run=str(folder), steps=steps)
    run = train.Run(parser.parse_args([]))
    model = run.model = Wuerstchen.load(folder, ("text", "a"))
    torch.manual_seed(0)
    network = nn.ModuleDict(dict(text=model.text_b, unet=make_baseline(model.config)))
    null = run.tokens([""])

    def compute(images, captions):
        ids, mask = run.tokens(captions)
        return dict(latents=model.a.encode(images).half(), ids=ids, mask=mask)

    def loss_fn(network, batch, step):
        text = network["text"](batch["ids"], batch["mask"])
        text = torch.where(train.bernoulli_mask(0.05, text), network["text"](*null), text)
        x0 = batch["latents"].float() / model.a.scale
        t, eps = torch.sigmoid(0.5 + torch.randn(len(x0))), torch.randn_like(x0)
        return diffusion_loss(eps, network["unet"](add_noise(x0, eps, t), t, None, text), t), {}

    arrays = run.cached("baseline", ("text.pt", "a.pt"), compute)
    train.fit(run, "b", network, run.cached_batches(arrays), loss_fn, None,
              lr_scale=lambda name: 0.1 if name.startswith("text") else 1)


@contextlib.contextmanager
def watch(measure, times=6):
    """While this is open, train.fit draws no sheets; instead it stops the clock `times` times and calls
    measure(run.model, averaged network). -> the list of (seconds of training, what was measured), which grows"""
    fit, found = train.fit, []

    def watched(run, stage, network, batches, loss_fn, preview, lr_scale):
        run.args.save_every, start, stopped = -(-run.recipe(stage).steps // times), time.time(), 0

        def look(average, images, captions):
            nonlocal stopped
            now = time.time()
            found.append((now - start - stopped, measure(run.model, average)))
            stopped += time.time() - now
            return []
        return fit(run, stage, network, batches, loss_fn, look, lr_scale)

    with mock.patch.object(train, "fit", watched):
        yield found


def baseline(args):
    captions, seeds = test_set(192)[1][:96], list(range(96))
    model = Wuerstchen.load(args.run)
    clip = CLIP(model.config).eval()
    clip.load_state_dict(torch.load(Path(args.run) / "clip.pt", weights_only=True))

    def judge(images):
        """-> whole captions right, and the Fréchet distance to other test images"""
        x, y = (in_batches(lambda some: clip.image_features(some).mean(dim=1), some) for some in (images, real))
        return check_all(images, captions)["whole"], frechet(x, y)

    def with_c(model, average):
        model.text_c, model.c = average["text_c"], average["c"]
        return judge(draw(model, captions))

    def with_baseline(model, average):
        return judge(in_batches(lambda some, seeds: draw_baseline(model, average["unet"], average["text"], some, seeds),
                                captions, seeds))

    with torch.no_grad():
        real = test_set(192)[0][96:]
    with watch(with_c) as c:
        train.main(["c", "--run", str(start_run(args, "c", ("text.pt", "a.pt", "b.pt")))])
    with watch(with_baseline) as unet:
        train_baseline(start_run(args, "baseline", ("text.pt", "a.pt")), args.steps or 1500)
    last = logged(args.run, "b")[-1]
    b = last["step"] * train.RECIPES["tiny"]["b"].batch / last["images_per_s"]
    curves = {"C on a trained B": c, "B, then C": [(b + seconds, found) for seconds, found in c], "one U-Net": unet}
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in (
        ("B", model.b), ("C", model.c), ("one U-Net", make_baseline(model.config)))}
    write("baseline", {"parameters": parameters, "(seconds, (whole captions, Fréchet))": curves}, make_chart(
        {name: [(0, 0)] * (name != "B, then C") + [(seconds / 60, 100 * whole) for seconds, (whole, _) in curve]
         for name, curve in curves.items()}, "minutes of training steps", "whole captions right, %"))


# ----------------------------------------------------------------------------------------------------------------------
# Inference.


@torch.no_grad()
def speed(args):
    """Three stages as `generate` runs them (C 60 steps with guidance, B 12 without) and the baseline (60 steps with
    guidance), with random weights. The median of three."""
    config = copy.deepcopy(PRESETS["tiny"])
    model = Wuerstchen(config, Wuerstchen.load(args.run, ()).tokenizer).eval()
    unet, results = make_baseline(config).eval(), {}

    def timed(function):
        """-> seconds, and what the function returns"""
        seconds = []
        for _ in range(3):
            start = time.time()
            out = function()
            seconds.append(time.time() - start)
        return sorted(seconds)[1], out

    for size, batch in ((128, 1), (128, 4), (128, 16), (256, 1), (256, 4), (512, 1)):
        captions, (cells, latents) = ["a red star"] * batch, config.grid(size, size)
        noise_c, noise_b = (normal_noise((batch, *shape), None, "cpu") for shape in ((*cells, 16), (*latents, 4)))
        c, semantic = timed(lambda: model.sample_c(noise_c, timesteps(60, "cpu"), captions))
        b, drawn = timed(lambda: model.sample_b(noise_b, timesteps(12, "cpu"), semantic, captions))
        a, _ = timed(lambda: model.a.decode(drawn))
        conditions = unet.encode_conditions(None, model.encode_text(captions + [""] * batch, "b"), latents)
        six, _ = timed(lambda: sample(unet.predict_eps, noise_b, timesteps(6, "cpu"), conditions, 4.0))
        seconds = {"C": c, "B": b, "A": a, "three stages": c + b + a, "one U-Net and A": 10 * six + a}  # 60 steps
        results[f"{size} px, batch {batch}"] = {name: round(s / batch, 3) for name, s in seconds.items()}
    write("speed", {"seconds per image": results}, make_chart(
        {name: [(size, results[f"{size} px, batch 1"][name]) for size in (128, 256, 512)] for name in seconds},
        "side in pixels", "seconds per image, batch 1", log=True))


# ----------------------------------------------------------------------------------------------------------------------
# How far to compress.


@contextlib.contextmanager
def semantic_cells(n):
    """While this is open, the semantic latents have n x n cells, whatever the image's size: the compressor sees the
    image scaled to 32n x 32n."""
    def shrink(images):
        return wuerstchen.resize(images, 32 * n, 32 * n)

    with (mock.patch.object(wuerstchen, "shrink", shrink), mock.patch.object(train, "shrink", shrink),
          mock.patch.object(Config, "cells", n)):
        yield


def compression(args):
    """The preset "quick" (64 px) with 4x4, 2x2 and 1x1 cells: Stages B and C of equal budgets, from one text encoder
    and one Stage A. "rebuilt": from the semantic latents of test images, by B without a caption."""
    (images, captions), seeds, rows, results = test_set(96, 64), list(range(96)), [], {}
    first = Path(args.run).parent / "paper_compression"
    shutil.rmtree(first, ignore_errors=True)
    train.main(["text", "--preset", "quick", "--run", str(first)])
    train.main(["a", "--run", str(first)])
    for n in (4, 2, 1):
        folder = first.with_name(f"paper_compression_{n}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(first, folder)
        with semantic_cells(n), torch.no_grad():
            with torch.enable_grad():
                train.main(["b", "--run", str(folder), "--steps", str(args.steps or 1400)])
                train.main(["c", "--run", str(folder), "--steps", "300"])
            model = Wuerstchen.load(folder)
            rebuilt = in_batches(lambda x, seeds: model.reconstruct(x, seed=seeds)[1], images, seeds)
            drawn = draw(model, captions)
        rows += [rebuilt[:8], drawn[:8]]
        results[f"{n}x{n}"] = {"numbers": 16 * n * n, "rebuilt": check_all(rebuilt, captions)["whole"],
                               "PSNR": psnr(rebuilt, images).mean().item(),
                               "drawn": check_all(drawn, captions)["whole"],
                               "loss of C": logged(folder, "c")[-1]["loss"]}
    write("compression", results, make_sheet([images[:8], *rows], captions[:8]))


# ----------------------------------------------------------------------------------------------------------------------
# Who does what.


def stages(args):
    """A small convolutional decoder learns to turn semantic latents into images, by their mean squared error; then it
    decodes what Stage C draws. Beside it, Stages B and A, with and without the caption."""
    model, layers, steps = Wuerstchen.load(args.run), [], args.steps or 1500
    torch.manual_seed(0)
    for c_in, c_out in ((16, 256), (256, 128), (128, 64), (64, 32), (32, 16)):  # 3x3 -> 96x96
        layers += [nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1), nn.GELU()]
    decoder = nn.Sequential(*layers, nn.Upsample((128, 128), mode="bilinear"), nn.Conv2d(16, 3, 3, padding=1))
    images = torch.stack([torch.from_numpy(train.Shapes(128)[i][0]) for i in range(4096)])
    with torch.no_grad():
        semantic = in_batches(lambda some: model.compress(some / 255), images)
    optimizer = torch.optim.AdamW(decoder.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        rows = torch.randint(len(images), (32,))
        loss = (decoder(semantic[rows].movedim(-1, 1)).movedim(1, -1) - images[rows] / 255).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    captions, seeds = test_set(96)[1], list(range(96))
    with torch.no_grad():
        noise = normal_noise((96, 3, 3, 16), generators(seeds, 96), "cpu")
        drawn = model.sample_c(noise, timesteps(60, "cpu"), captions, guidance=2.0)

        def by_b(captions):
            return in_batches(lambda x, some, seeds: model.from_semantic(x, some, generator=generators(seeds, len(x))),
                              drawn, captions, seeds)

        rows = {"C, then the small decoder": decoder(drawn.movedim(-1, 1)).movedim(1, -1).clamp(0, 1),
                "C, then B without the caption": by_b([""] * 96), "C, then B with the caption": by_b(captions)}
    write("stages", {"decoder's loss": loss.item(), "whole captions": {
        name: check_all(images, captions)["whole"] for name, images in rows.items()}},
        make_sheet([images[:8] for images in rows.values()], captions[:8]))


# ----------------------------------------------------------------------------------------------------------------------
# A new size.


def size(args):
    """Stage C with 4x4 cells (160 px) and 6x6 (256 px), from the weights for 3x3 cells and from nothing, with the same
    schedule: the steps after which its loss, as a mean of 16, is below a value."""
    results, curves = {}, {}
    options = ["--steps", str(args.steps or 192), "--cache", "2048", "--batch-size", "64", "--log-every", "1"]
    for side, n in ((160, 4), (256, 6)):
        for name in (f"{n}x{n}, from weights", f"{n}x{n}, from nothing"):
            if "weights" in name:
                folder = Path(args.run).parent / "paper_size"
                shutil.rmtree(folder, ignore_errors=True)
                train.main(["c", "--run", str(folder), "--init-from", args.run, "--image-size", str(side), *options])
            else:
                folder = start_run(args, "size", ("text.pt", "a.pt", "b.pt"), image_size=side)
                train.main(["c", "--run", str(folder), *options])
            losses = torch.tensor([line["loss"] for line in logged(folder, "c")]).unfold(0, 16, 1).mean(dim=1).tolist()
            curves[name] = list(enumerate(losses, 16))
            results[name] = {f"loss {value}": next((i for i, loss in curves[name] if loss < value), None)
                             for value in (0.2, 0.1, 0.05)}
    write("size", results, make_chart(curves, "steps of C", "loss", log=True))


def main(argv=None):
    claims = {claim.__name__: claim for claim in (baseline, speed, compression, stages, size)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=claims)
    parser.add_argument("--run", default="runs/tiny", help="a finished default run")
    parser.add_argument("--steps", type=int, help="training steps, other than those that we report")
    args = parser.parse_args(argv)
    claims[args.claim](args)


if __name__ == "__main__":
    main()
