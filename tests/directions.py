"""
Variations on the paper, mostly what its authors leave for later work, each tried once in miniature: Shapes at 64 px,
with the text encoder and Stage A of the model that comes with the code.

    python tests/directions.py tokens        version 1's Stage B: as published, and with changes that make it work
    python tests/directions.py positions     version 2's Stage B, seeing the semantic latents by attention alone
    python tests/directions.py quantized     semantic latents rounded to one of 625 codes per cell; C predicts the codes
    python tests/directions.py steps         fewer steps of Stage B (128 px)
    python tests/directions.py upsampling    Stage B at 128 px, from the semantic latents of images of 64 px
    python tests/directions.py text          Stage B trained without captions

`tokens` took 86 minutes on one core (AMD EPYC, Zen 3), `positions` 40, the others less. Each writes
tests/directions/NAME.json, with a plot or a sheet of images beside it. Everything is seeded. The recipe is that of the
preset quick, except that Stage B takes --steps steps. Runs stay in --run, and are not trained again: give another
folder if you change something.
"""

import argparse
import contextlib
import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
from torch import nn

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

import train  # noqa: E402
import wuerstchen  # noqa: E402
from paper import generate, test_set, train_stage, write  # noqa: E402
from sample import make_sheet  # noqa: E402
from score import check_all, in_batches, psnr  # noqa: E402
from wuerstchen import (PRESETS, Config, SemanticCompressor, StageB, StageC, TokenStageB, Wuerstchen,  # noqa: E402
                        add_negatives, add_noise, generators, normal_noise, random_numbers, replace_tokens, resize,
                        sample_tokens, time_embedding, token_loss, training_times)

MODEL, OUT = HERE / "tests" / "shapes", HERE / "tests" / "directions"
COUNT = 256  # test images and captions


def start_run(folder, image_size, **changes):
    """A new run with the text encoder and Stage A of the model that comes with the code; B's sizes as in the preset
    quick, except for `changes` to the Config"""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODEL / "tokenizer", folder / "tokenizer")
    config = Config.from_dict(json.loads((MODEL / "config.json").read_text()))
    config = replace(config, image_size=image_size, rescale=96 / image_size, b=PRESETS["quick"].b)
    config = replace(config, **changes)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    options = json.loads((MODEL / "options.json").read_text())
    (folder / "options.json").write_text(json.dumps(options | dict(image_size=image_size, preset="quick")))
    weights = torch.load(MODEL / "a.pt", weights_only=True)
    weights["a"]["scale"] *= image_size / 128  # as train.set_scale does
    torch.save(weights, folder / "a.pt")
    weights = torch.load(MODEL / "text.pt", weights_only=True)
    trained = {name: x for name, x in weights["compressor"].items() if name.startswith("backbone")}
    weights["compressor"] = SemanticCompressor(config).state_dict() | trained  # the last layers need semantic_channels
    torch.save(weights, folder / "text.pt")


def train_and_judge(args, name, patches=None, steps=None, stages="bc", image_size=64, **changes):
    """In a new run, trains Stage B with its compressor, and then Stage C unless stages="b"; loads the run if it exists.
    patches: {"module.name": the class or function that replaces it}. -> "reconstructed", the share of images that match
    their whole caption when B reconstructs them from the semantic latents alone, "generated", the same for generated
    images, and "PSNR" of the reconstructed ones; all of these images; the model"""
    with contextlib.ExitStack() as stack:
        for target, other in (patches or {}).items():
            stack.enter_context(mock.patch(target, other))
        folder = Path(args.run) / name
        if not (folder / f"{stages[-1]}.pt").exists():
            start_run(folder, image_size, **changes)
            train_stage("b", folder, "--steps", str(steps or args.steps))
            if "c" in stages:
                train_stage("c", folder)
        model, (images, captions) = train.Wuerstchen.load(folder, ("text", "a", *stages)), test_set(COUNT, image_size)
        seeds = list(range(COUNT))
        reconstructed = in_batches(lambda some, seeds: model.reconstruct(some, seed=seeds)[1], images, seeds)
        results, rows = {"reconstructed": check_all(reconstructed, captions)["whole"],
                         "PSNR": round(psnr(reconstructed, images).mean().item(), 2)}, [reconstructed]
        if "c" in stages:
            rows.append(generate(model, captions))
            results["generated"] = check_all(rows[1], captions)["whole"]
    return results, rows, model


def compare(args, name, tries):
    """tries: {what: arguments of `train_and_judge`}; no arguments mean version 2, which is trained once for all
    commands. -> results; a sheet: test images, then, for each try, a reconstructed and (with C) a generated row; the
    models"""
    (images, captions), results, rows, models = test_set(8, 64), {}, [], []
    for what, options in tries.items():
        folder = f"{name}_{len(results)}" if options else "v2"
        results[what], found, model = train_and_judge(args, folder, **options)
        rows += [row[:8] for row in found]
        models.append(model)
    return results, make_sheet([images, *rows], captions), models


# ----------------------------------------------------------------------------------------------------------------------
# Semantic latents that are seen by attention.


class MapperWithPlaces(nn.Linear):
    """Maps semantic latents as version 1 does, and adds to each cell a learned vector that says where it lies."""

    def __init__(self, config):
        super().__init__(config.semantic_channels, config.b.cond_width)
        self.places = nn.Parameter(torch.randn(config.cells, config.cells, config.b.cond_width))
        nn.init.normal_(self.weight, std=config.semantic_channels**-0.5)  # gives cells the same variance as places

    def forward(self, semantic):
        return super().forward(semantic) + self.places


class AttentionStageB(StageB):
    """Version 2's Stage B, with the semantic latents beside the text instead of in the ResBlocks."""

    def __init__(self, config):
        super().__init__(config)
        self.semantic_mapper = nn.Linear(config.semantic_channels, config.b.cond_width)

    encode_conditions = TokenStageB.encode_conditions


class AttentionStageBWithPlaces(AttentionStageB):
    def __init__(self, config):
        super().__init__(config)
        self.semantic_mapper = MapperWithPlaces(config)


def positions(args):
    blind = replace(PRESETS["quick"].b, sees_semantic=(False, False))
    write(OUT / "positions", *compare(args, "positions", {
        "in the ResBlocks": {},
        "by attention": dict(b=blind, patches={"wuerstchen.StageB": AttentionStageB}),
        "by attention, with positions": dict(b=blind, patches={"wuerstchen.StageB": AttentionStageBWithPlaces})})[:2])


# ----------------------------------------------------------------------------------------------------------------------
# Version 1's Stage B.


class EmbedWithPlaces(nn.Linear):
    """Stage B's first Linear, which also adds a learned vector to each position of the U-Net's input."""

    def __init__(self, config):
        cfg, side = config.b, config.image_size // 4 // config.b.patch
        super().__init__(cfg.token_width * cfg.patch**2, cfg.channels[0])
        self.places = nn.Parameter(torch.randn(side, side, cfg.channels[0]))

    def forward(self, x):
        return super().forward(x) + self.places


class PlacedTokenStageB(TokenStageB):
    """Tells attention where each cell lies, and where each position of the U-Net lies that attends to it."""

    def __init__(self, config):
        super().__init__(config)
        self.semantic_mapper, self.embed = MapperWithPlaces(config), EmbedWithPlaces(config)


class CodebookTokenStageB(PlacedTokenStageB):
    """A code's embedding, and its row in the last Linear, start as random Fourier features of its vector in Stage A's
    codebook: codes that look alike have similar embeddings from the start."""

    def __init__(self, config):
        super().__init__(config)
        codebook = torch.load(MODEL / "a.pt", weights_only=True)["a"]["quantizer.codebook"].float()
        codebook, width = (codebook - codebook.mean(dim=0)) / codebook.std(dim=0), config.b.token_width
        waves = (codebook @ torch.randn(codebook.shape[1], width) + 2 * math.pi * torch.rand(width)).sin()
        self.tokens.weight.data = (2 / len(codebook)) ** 0.5 * waves
        self.logits.weight.data = self.tokens.weight.data.clone()


def late_token_stage_b_loss(*given, loss=train.token_stage_b_loss, **named):
    """More of the times are near 1, where nearly all codes are random ones and only the semantic latents help."""
    with mock.patch.object(train, "training_times", lambda n, device: 1 - torch.rand(n, device=device) ** 2):
        return loss(*given, **named)


def noisier_conditions(*given, conditions=train.noisy_conditions):
    """Half of the semantic latents are noised once more, at a time in [0, 0.3]: Stage C's will not be exact."""
    e, text = conditions(*given)
    noised = add_noise(e, torch.randn_like(e), 0.3 * torch.rand(len(e)))
    return torch.where(train.bernoulli_mask(0.5, e) & (e != 0), noised, e), text


def tokens(args):
    """Trains version 1's Stage B alone: as published, then with more and more changes. Then with all of them and with
    Stage C: 2500 steps of B, which take about as long as B's in the default run."""
    b = replace(PRESETS["quick"].b, token_width=128, sees_semantic=(False, False))
    places = dict(b=replace(b, heads=(4, 4)), stages="b", patches={"wuerstchen.TokenStageB": PlacedTokenStageB})
    late = places | dict(patches=places["patches"] | {"train.token_stage_b_loss": late_token_stage_b_loss})
    codebook = late | dict(patches=late["patches"] | {"wuerstchen.TokenStageB": CodebookTokenStageB})
    noisier = codebook | dict(patches=codebook["patches"] | {"train.noisy_conditions": noisier_conditions})
    write(OUT / "tokens", *compare(args, "tokens", {
        "as published": dict(b=b, stages="b"), "with positions, and attention at both levels": places,
        "times near 1": late, "embeddings from the codebook": codebook, "noisier semantic latents": noisier,
        "all, 2500 steps of B": noisier | dict(steps=2500, stages="bc"), "version 2": {}})[:2])


# ----------------------------------------------------------------------------------------------------------------------
# Quantized semantic latents.

LEVELS, CHANNELS = 5, 4  # 5^4 = 625 codes


class QuantizedCompressor(SemanticCompressor):
    """Finite scalar quantization (Mentzer et al., 2023): each channel is rounded to -2, -1, 0, 1 or 2. The gradient
    ignores the rounding."""

    def forward(self, images):
        e = 2 * super().forward(images).float().tanh()
        return e + (e.round() - e).detach()


def to_codes(semantic):
    """(B, hs, ws, CHANNELS), whole numbers from -2 to 2 -> codes (B, hs, ws)"""
    return ((semantic.round().long() + 2) * LEVELS ** torch.arange(CHANNELS)).sum(dim=-1)


def from_codes(codes):
    """The inverse of `to_codes`."""
    return (codes[..., None] // LEVELS ** torch.arange(CHANNELS) % LEVELS - 2).float()


class TokenStageC(StageC):
    """A Stage C that predicts the cells' codes. In its input, a share t of them has been replaced by random ones."""

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(LEVELS**CHANNELS, config.c.width)
        self.out = nn.Linear(config.c.width, LEVELS**CHANNELS)
        nn.init.zeros_(self.out.weight)

    def forward(self, codes, t, text):
        """codes: noisy (B, hs, ws), t (B,), text (B, L, text width) -> logits (B, hs, ws, 625)"""
        return self.predict_logits(codes, t, self.encode_conditions(text))

    def predict_logits(self, codes, t, conditions):
        h = self.blocks(self.embed(codes), time_embedding(t, self.time_width), conditions)
        return self.out(self.out_norm(h))


def token_stage_c_loss(c, semantic, text, null_text):
    """Like `train.stage_c_loss`, but with the noise and the loss of tokens."""
    text = torch.where(train.bernoulli_mask(0.05, text), null_text, text)
    codes, t = to_codes(semantic), training_times(len(semantic), semantic.device)
    noisy, replaced = replace_tokens(codes, torch.randint_like(codes, LEVELS**CHANNELS), t)
    return token_loss(c(noisy, t, text), codes, replaced, t), t


class QuantizedWuerstchen(Wuerstchen):
    @torch.no_grad()
    def sample_c(self, x, times, prompts, negative="", guidance=None, generator=None):
        """As in Wuerstchen, but always with the config's guidance. Only the shape of `x` is used."""
        start = (random_numbers(torch.rand, x.shape[:3], generator, x.device) * LEVELS**CHANNELS).long()
        conditions = self.c.encode_conditions(self.encode_text(add_negatives(prompts, negative), "c"))
        return from_codes(sample_tokens(self.c.predict_logits, start, times, conditions, self.config.guidance[0],
                                        generator))


def quantized(args):
    """Semantic latents of 16 numbers per cell, of 4, and of 4 that are rounded (625 codes). The last are generated with
    other numbers of steps of Stage C too."""
    patches = {"wuerstchen.SemanticCompressor": QuantizedCompressor, "wuerstchen.StageC": TokenStageC,
               "train.stage_c_loss": token_stage_c_loss, "train.Wuerstchen": QuantizedWuerstchen}
    results, sheet, (*_, model) = compare(args, "quantized", {
        "16 channels": {}, f"{CHANNELS} channels": dict(semantic_channels=CHANNELS),
        f"{CHANNELS} channels, rounded": dict(semantic_channels=CHANNELS, patches=patches)})
    captions = test_set(COUNT, 64)[1]
    with torch.no_grad():
        codes = to_codes(in_batches(model.compress, test_set(2048, 64)[0]))
    results["codes in use"] = len(codes.unique())
    for n in (2, 4, 8, 40):
        generated = in_batches(lambda some, seeds: model.generate(some, seed=seeds, steps=(n, None)), captions,
                           list(range(COUNT)))
        results[f"rounded, generated in {n} steps"] = check_all(generated, captions)["whole"]
    write(OUT / "quantized", results, sheet)


# ----------------------------------------------------------------------------------------------------------------------
# Steps, sizes and captions of Stage B.


@torch.no_grad()
def steps(args):
    """The model that comes with the code, 128 px: the same semantic latents, of test images and generated by Stage C,
    go through Stages B and A with 1 to 12 steps of B (default: 12)."""
    model, (images, captions), seeds = Wuerstchen.load(MODEL), test_set(COUNT), list(range(COUNT))
    compressed, noise = in_batches(model.compress, images), generators(seeds, COUNT)
    generated = model.sample_c(normal_noise(compressed.shape, noise, "cpu"), model.times(None, "c"), captions,
                           generator=noise)
    curves = {}
    for sampler in ("ddpm", "ddim"):
        for name, semantic, texts in (("reconstructed", compressed, [""] * COUNT), ("generated", generated, captions)):
            for n in (1, 2, 4, 8, 12):
                out = in_batches(lambda e, some, seeds: model.from_semantic(
                    e, some, steps=n, sampler=sampler, generator=generators(seeds, len(seeds))), semantic, texts, seeds)
                curves.setdefault(f"{name}, {sampler}", []).append((n, 100 * check_all(out, captions)["whole"]))
    write(OUT / "steps", {"whole captions, % (steps of B: 1, 2, 4, 8, 12)": {
        name: [round(y, 1) for _, y in curve] for name, curve in curves.items()}},
        train.plot(curves, "steps of B", "captions fully correct, %", circles=curves))


def upsampling(args):
    """Stage B at 128 px, from the semantic latents of the same image, and from those of the image reduced to 64 px.
    Reconstructed images are compared with the originals at both sizes."""
    def reduced(images, scale, rescaled=wuerstchen.rescaled):
        return rescaled(resize(resize(images, 64, 64), 128, 128), scale)

    (images, captions), results = test_set(COUNT, 128), {}
    sheet, size = [images[:8]], dict(image_size=128, stages="b", b=PRESETS["tiny"].b)
    for what, patches in (("128 px", {}), ("64 px", {"wuerstchen.rescaled": reduced, "train.rescaled": reduced})):
        found, (reconstructed,), _ = train_and_judge(args, f"upsampling_{len(results)}", patches, **size)
        sheet.append(reconstructed[:8])
        results[f"semantic latents of {what}"] = found | {"PSNR, both reduced to 64 px": round(
            psnr(resize(reconstructed, 64, 64), resize(images, 64, 64)).mean().item(), 2)}
    write(OUT / "upsampling", results, make_sheet(sheet, captions[:8]))


def text(args):
    """Stage B trained with captions, as always, and without any."""
    def without(semantic, text, null_text, conditions=train.noisy_conditions):
        return conditions(semantic, null_text.expand_as(text), null_text)

    results, sheet, models = compare(args, "text", {
        "with captions": {}, "without captions": dict(patches={"train.noisy_conditions": without})})
    captions, seeds = test_set(COUNT, 64)[1], list(range(COUNT))
    for found, model in zip(results.values(), models):
        noise = normal_noise((COUNT, 3, 3, 16), generators(seeds, COUNT), "cpu")
        generated = in_batches(
            lambda e, seeds: model.from_semantic(e, [""] * len(e), generator=generators(seeds, len(e))),
            model.sample_c(noise, model.times(None, "c"), captions), seeds)
        found["generated, B without captions"] = check_all(generated, captions)["whole"]
    write(OUT / "text", results, sheet)


def main(argv=None):
    directions = {f.__name__: f for f in (tokens, positions, quantized, steps, upsampling, text)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=directions)
    parser.add_argument("--run", default="runs/directions", help="folder for the runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=700, help="of Stage B (default: %(default)s)")
    args = parser.parse_args(argv)
    directions[args.direction](args)


if __name__ == "__main__":
    main()
