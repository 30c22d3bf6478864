"""
The paper's claims, measured in miniature on Shapes, with a finished default run (python train.py):

    python tests/paper.py baseline       Stage C on a trained B, against one U-Net on Stage A's latents (section 4, E.4)
    python tests/paper.py speed          seconds per image, by batch and image size (figure 4)
    python tests/paper.py compression    what is lost with 4x4, 2x2 and 1x1 semantic cells (section 3.4)
    python tests/paper.py stages         Stage C's semantic latents decoded with and without Stage B (appendix D)
    python tests/paper.py size           steps that Stage C needs at another size, from trained and from new weights

Each takes at most half an hour on two CPU cores and writes tests/paper/NAME.json, with a plot or a sheet of images
beside it. Everything is seeded. Stages B and C are trained by train.py, in folders paper_* beside the default run's.
"""

import argparse
import contextlib
import copy
import json
import math
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

import train  # noqa: E402
from sample import make_sheet  # noqa: E402
from score import check_all, frechet, in_batches, psnr  # noqa: E402
from wuerstchen import (CLIP, StageB, Wuerstchen, add_noise, diffusion_loss, generators,  # noqa: E402
                        normal_noise, sample, timesteps)

OUT = HERE / "tests" / "paper"


def write(path, results, image):
    """Prints results; writes them to path.json, and an image to path.png."""
    path.parent.mkdir(exist_ok=True)
    print(text := json.dumps(results, indent=1, ensure_ascii=False))
    path.with_suffix(".json").write_text(text + "\n", "utf-8")
    image.save(path.with_suffix(".png"))


def start_run(args, name, files, image_size=None, cells=None):
    """A new run with some stages of the default run, for another image size or number of semantic cells per side if
    they are given -> its folder"""
    source, folder = Path(args.run), Path(args.run).parent / f"paper_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "tokenizer", folder / "tokenizer")
    for file in files:
        shutil.copy(source / file, folder)
    for file in ("config.json", "options.json"):
        sizes = json.loads((source / file).read_text())
        sizes["image_size"] = image_size or sizes["image_size"]
        if cells and file == "config.json":
            sizes["rescale"] = 32 * cells / sizes["image_size"]
        (folder / file).write_text(json.dumps(sizes))
    return folder


def train_stage(stage, folder, *options):
    """Trains a stage of a run -> its lines of metrics.jsonl"""
    train.main([stage, "--run", str(folder), "--device", "cpu", *options])
    lines = train.read_log(Path(folder))
    return [line for line in lines if line["stage"] == stage]


def test_set(count, size=128):
    """-> images (count, size, size, 3) in [0, 1] and captions that were never trained on"""
    return train.examples(train.Shapes(size, split="test"), count)


def generate(model, captions):
    """An image for each caption, by all three stages, with the seeds 0, 1, ..."""
    return in_batches(lambda some, seeds: model.generate(some, seed=seeds), captions, list(range(len(captions))))


# ----------------------------------------------------------------------------------------------------------------------
# The baseline: one text-conditional U-Net on Stage A's latents, with as many parameters as Stages B and C together.

UNET_STEPS = 30  # to generate an image


def make_baseline(config):
    """Stage B's network without semantic latents. The channels that it has in addition to Stage B's are at the lower
    resolutions, where a parameter costs the least time."""
    config = copy.deepcopy(config)
    config.b.channels, config.b.sees_semantic = (64, 256, 328), (False,) * 3
    return StageB(config)


@torch.no_grad()
def generate_baseline(model, network, text_encoder, captions, seeds, steps=UNET_STEPS, guidance=2.0):
    """captions: list of B, seeds: list of B -> images (B, H, W, 3)"""
    ids, mask = model.tokenizer(captions + [""] * len(captions))
    side, generator = model.config.image_size // 4, generators(seeds, len(captions))
    conditions = network.encode_conditions(None, text_encoder(ids, mask), (side, side))
    x = normal_noise((len(captions), side, side, model.config.latent_channels), generator, "cpu")
    latents = sample(network.predict_eps, x, timesteps(steps, "cpu"), conditions, guidance, generator)
    return model.a.decode(latents * model.a.scale).clamp(0, 1)


def train_baseline(folder, steps):
    """As in Stage B: the recipe, the scale of the latents, the distribution of t. As in Stage C: the text encoder is
    trained too, and 5% of the captions are dropped."""
    args = train.parse_args(["--run", str(folder), "--device", "cpu", "--steps", str(steps)])
    run = train.Run(args, train.open_data(args))
    model = run.model = Wuerstchen.load(folder, ("text", "a"))
    torch.manual_seed(0)
    network = nn.ModuleDict(dict(text=model.text_b, unet=make_baseline(model.config)))

    def loss_fn(network, batch, step):
        text, null_text = run.encode(network["text"], batch["captions"])
        text = torch.where(train.bernoulli_mask(0.05, text), null_text, text)
        x0 = batch["latents"].float() / model.a.scale
        t, eps = torch.sigmoid(0.5 + torch.randn(len(x0))), torch.randn_like(x0)
        return diffusion_loss(eps, network["unet"](add_noise(x0, eps, t), t, None, text), t).mean(), {}

    arrays = run.cached("baseline", "a.pt", lambda images: dict(latents=model.a.encode(images).half()))
    train.fit(run, "b", network, run.cached_batches(arrays), loss_fn,
              lr_scale=lambda name: 0.1 if name.startswith("text") else 1)


@contextlib.contextmanager
def watch(measure, times=5):
    """In this context, train.fit makes no sheets. Instead, it calls measure(run.model, averaged network) about `times`
    times. -> a growing list of (seconds of training, without the time for measuring; what was measured)"""
    fit, found = train.fit, []

    def watched(run, stage, network, batches, loss_fn, preview=None, **options):
        run.args.save_every, start, stopped = math.ceil(run.recipe(stage).steps / times), time.time(), 0

        def look(average, images, captions):
            nonlocal stopped
            now = time.time()
            found.append((now - start - stopped, measure(run.model, average)))
            stopped += time.time() - now
            return []
        return fit(run, stage, network, batches, loss_fn, preview=look, **options)

    with mock.patch.object(train, "fit", watched):
        yield found


def baseline(args):
    images, captions = test_set(192)
    captions, seeds, real = captions[:96], list(range(96)), images[96:]
    clip = CLIP(Wuerstchen.load(args.run, ()).config).eval()
    clip.load_state_dict(torch.load(Path(args.run) / "clip.pt", weights_only=True))

    @torch.no_grad()
    def judge(images):
        x, y = (in_batches(lambda some: clip.image_features(some).mean(dim=1), some) for some in (images, real))
        return {"whole": check_all(images, captions)["whole"], "Fréchet": frechet(x, y)}

    def with_c(model, average):
        model.text_c, model.c = average["text_c"], average["c"]
        return judge(generate(model, captions))

    def with_unet(model, average):
        networks = average["unet"], average["text"]
        return judge(in_batches(lambda some, seeds: generate_baseline(model, *networks, some, seeds), captions, seeds))

    # A machine's speed drifts, so B's time, although the default run has it, is measured again, over 60 steps.
    recipe = train.RECIPES["tiny"]["b"]
    line = train_stage("b", start_run(args, "b", ("text.pt", "a.pt")), "--steps", "60", "--cache", "512")[-1]
    b_seconds = recipe.steps * recipe.batch / line["images_per_s"]
    with watch(with_c) as c:
        train_stage("c", start_run(args, "c", ("text.pt", "a.pt", "b.pt")))
    with watch(with_unet) as unet:
        train_baseline(start_run(args, "baseline", ("text.pt", "a.pt")), args.steps or 4000)
    curves = {"C on a trained B": c, "B, then C": [(b_seconds + seconds, found) for seconds, found in c],
              "one U-Net": unet}
    points = {name: [(seconds / 60, 100 * found["whole"]) for seconds, found in curve]
              for name, curve in curves.items()}
    write(OUT / "baseline",
          {name: [{"seconds": seconds, **found} for seconds, found in curve] for name, curve in curves.items()},
          train.plot(points, "minutes of training steps", "captions fully correct, %", circles=points))


# ----------------------------------------------------------------------------------------------------------------------
# Inference.

SPEED = ("C", "B", "A", "three stages", "one U-Net, then A")


@torch.no_grad()
def speed(args):
    """Three stages as `generate` runs them (C 20 steps with guidance, B 12 without), and the baseline with guidance.
    Times are medians of three runs. The baseline's weights are random, which does not change its time."""
    torch.manual_seed(0)
    model, results = Wuerstchen.load(args.run), {}
    unet = make_baseline(model.config).eval()

    def timed(function):
        """-> seconds, and what the function returns"""
        seconds = []
        for _ in range(3):
            start = time.time()
            out = function()
            seconds.append(time.time() - start)
        return sorted(seconds)[1], out

    for size, batch in ((128, 1), (128, 4), (128, 16), (256, 1), (256, 4), (512, 1)):
        captions, (cells, latents) = ["a red star"] * batch, model.config.grid(size, size)
        noise_c, noise_b = (normal_noise((batch, *shape), None, "cpu") for shape in ((*cells, 16), (*latents, 4)))
        c, semantic = timed(lambda: model.sample_c(noise_c, model.times(None, "c"), captions))
        b, generated = timed(lambda: model.sample_b(noise_b, model.times(None, "b"), semantic, captions))
        a, _ = timed(lambda: model.a.decode(generated))
        text, conditions = timed(lambda: unet.encode_conditions(
            None, model.encode_text(captions + [""] * batch, "b"), latents))
        steps, _ = timed(lambda: sample(unet.predict_eps, noise_b, timesteps(5, "cpu"), conditions, 2.0))
        seconds = (c, b, a, c + b + a, text + UNET_STEPS / 5 * steps + a)
        results[f"{size} px, batch {batch}"] = {name: round(s / batch, 3) for name, s in zip(SPEED, seconds)}
    curves = {name: [(size, results[f"{size} px, batch 1"][name]) for size in (128, 256, 512)] for name in SPEED}
    write(OUT / "speed", {"seconds per image": results},
          train.plot(curves, "side in pixels", "seconds per image, batch 1", log=True, circles=curves))


# ----------------------------------------------------------------------------------------------------------------------
# How far to compress.


def compression(args):
    """4x4, 2x2 and 1x1 cells for images of 64 px: each grid gets the same numbers of steps for B and for C, and the
    default run's text encoder and Stage A. "reconstructed": from the semantic latents of test images, by B without a
    caption. The sheet: test images; then, for each grid, a row that is reconstructed and a row that is generated."""
    (images, captions), seeds, rows, results = test_set(96, 64), list(range(96)), [], {}
    for n in (4, 2, 1):
        folder = start_run(args, f"compression_{n}", ("text.pt", "a.pt"), image_size=64, cells=n)
        weights = torch.load(folder / "a.pt", weights_only=True)
        weights["a"]["scale"] /= 2  # as train.set_scale does for half the size
        torch.save(weights, folder / "a.pt")
        train_stage("b", folder, "--steps", str(args.steps or 1500), "--cache", "4096")
        train_stage("c", folder, "--steps", str(args.steps or 450))
        model = Wuerstchen.load(folder)
        reconstructed = in_batches(lambda x, seeds: model.reconstruct(x, seed=seeds)[1], images, seeds)
        generated = generate(model, captions)
        rows += [reconstructed[:8], generated[:8]]
        results[f"{n}x{n}"] = {"semantic numbers": 16 * n * n,
                               "reconstructed": check_all(reconstructed, captions)["whole"],
                               "PSNR": psnr(reconstructed, images).mean().item(),
                               "generated": check_all(generated, captions)["whole"]}
    write(OUT / "compression", results, make_sheet([images[:8], *rows], captions[:8]))


# ----------------------------------------------------------------------------------------------------------------------
# Who does what.


def stages(args):
    """A small convolutional decoder learns to turn semantic latents into images, by mean squared error. Then it decodes
    those of test images and those that Stage C generates. For comparison, Stages B and A decode Stage C's, with and
    without the caption."""
    model, layers, steps = Wuerstchen.load(args.run), [], args.steps or 1500
    torch.manual_seed(0)
    for c_in, c_out in ((16, 256), (256, 128), (128, 64), (64, 32), (32, 16)):  # 3x3 -> 96x96
        layers += [nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1), nn.GELU()]
    network = nn.Sequential(*layers, nn.Upsample((128, 128), mode="bilinear"), nn.Conv2d(16, 3, 3, padding=1))

    def decoder(semantic):  # (B, 3, 3, 16) -> (B, 128, 128, 3)
        return network(semantic.movedim(-1, 1)).movedim(1, -1)

    images = torch.stack([torch.from_numpy(train.Shapes(128)[i][0]) for i in range(4096)])
    with torch.no_grad():
        semantic = in_batches(lambda some: model.compress(some / 255), images)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        (decoder(semantic[chosen]) - images[chosen] / 255).square().mean().backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        (real, captions), seeds = test_set(96), list(range(96))
        compressed, generator = in_batches(model.compress, real), generators(seeds, 96)
        generated = model.sample_c(normal_noise((96, 3, 3, 16), generator, "cpu"), model.times(None, "c"), captions,
                               generator=generator)

        def by_b(captions):
            return in_batches(lambda x, some, seeds: model.from_semantic(x, some, generator=generators(seeds, len(x))),
                              generated, captions, seeds)

        rows = {"the images": real, "compressed, then the small decoder": decoder(compressed).clamp(0, 1),
                "C, then the small decoder": decoder(generated).clamp(0, 1),
                "C, then B without the caption": by_b([""] * 96), "C, then B with the caption": by_b(captions)}
    write(OUT / "stages", {"whole captions": {name: check_all(row, captions)["whole"] for name, row in rows.items()}},
          make_sheet([row[:8] for row in rows.values()], captions[:8]))


# ----------------------------------------------------------------------------------------------------------------------
# A new size.


def size(args):
    """Trains Stage C with 4x4 cells (160 px) and 6x6 (256 px), from the weights for 3x3 cells and from new ones, with
    the same schedule, and finds the step at which the mean training loss of the last 16 steps falls below a value. The
    compressor and the contrastive text encoder are the default run's in both cases."""
    results, curves = {}, {}
    options = ["--steps", str(args.steps or 128), "--cache", "1024", "--batch-size", "64", "--log-every", "1"]
    for side, n in ((160, 4), (256, 6)):
        for trained in (True, False):
            folder = start_run(args, "size", ("text.pt", "a.pt", "b.pt"), image_size=side)
            if trained:
                shutil.rmtree(folder)  # train.py makes it again, with the weights of --init-from
            start = ["--init-from", args.run, "--image-size", str(side)] if trained else []
            lines = train_stage("c", folder, *start, *options)
            losses = torch.tensor([line["loss"] for line in lines]).unfold(0, 16, 1).mean(dim=1).tolist()
            name = f"{n}x{n}, {'trained at 3x3' if trained else 'new weights'}"
            curves[name] = list(enumerate(losses, 16))
            results[name] = {f"loss {value}": next((i for i, loss in curves[name] if loss < value), None)
                             for value in (0.08, 0.06, 0.04)}
    write(OUT / "size", results, train.plot(curves, "steps of C", "loss", log=True))


def main(argv=None):
    claims = {claim.__name__: claim for claim in (baseline, speed, compression, stages, size)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=claims)
    parser.add_argument("--run", default="runs/tiny", help="a finished default run")
    parser.add_argument("--steps", type=int, help="training steps (default: as in the reported results)")
    args = parser.parse_args(argv)
    claims[args.claim](args)


if __name__ == "__main__":
    main()
