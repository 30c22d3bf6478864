"""
Trains Würstchen from scratch, stage by stage:

    python train.py                                      everything: Shapes, 128 px
    python train.py --data cifar10 --data-dir data --download --run runs/cifar
    python train.py --data folder --data-dir DIR --run runs/mine        your own images, with captions in .txt files
    python train.py c --steps 5000                       one stage again, from new weights, for longer

It first trains a tokenizer, then a text encoder by contrastive learning (the paper uses CLIP's). After that, as in the
paper, it trains Stage A, then Stage B with its semantic compressor, then Stage C on the semantic latents. Stage B uses
the text encoder unchanged; Stage C continues training its own copy. The README lists what differs from the authors'
training. A run writes these files to its folder:

    config.json, tokenizer/     sizes and vocabulary
    options.json                the options that later commands reuse
    text.pt a.pt b.pt c.pt      finished stages, as `Wuerstchen.load` reads them: the averaged (EMA) weights
    clip.pt                     the whole contrastive model, which tests/score.py uses
    STAGE.ckpt, cache/          the checkpoint of an unfinished stage, and its precomputed training data
    metrics.jsonl               a line every few steps: loss (in B and C also by quarter of t's range: loss_0, ...,
                                loss_75), learning rate, images per second; at checkpoints and the end: test loss
    sheets/, curves.png         images that show the progress, and a plot of the losses
    report.md                   the machine; the time, memory and last losses of each stage

Read this file from top to bottom: recipes, losses, optimizer and training loop, stages; data, plots, command line.
"""

import argparse
import collections
import contextlib
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import time
import unicodedata
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sample import DEVICES, load_image, make_sheet, number, pick_device, print_machine, run_script
from tokenizer import Tokenizer, UserError, read_json, read_text
from wuerstchen import (CLIP, PRESETS, Discriminator, StageB, StageC, Wuerstchen, add_noise, alpha_bar,
                        contrastive_loss, diffusion_loss, load_file, load_state, replace_tokens, rescaled,
                        save_atomically, token_loss, training_times)

# ----------------------------------------------------------------------------------------------------------------------
# The recipes: steps, batch size and peak learning rate of each stage.


@dataclass
class Recipe:
    steps: int
    batch: int
    lr: float  # the peak learning rate


RECIPES = {
    "tiny": dict(text=Recipe(450, 64, 5e-4), a=Recipe(1000, 16, 6e-3), b=Recipe(2350, 16, 1.2e-3),
                 c=Recipe(600, 64, 1.5e-3)),
    "quick": dict(text=Recipe(250, 64, 5e-4), a=Recipe(700, 16, 6e-3), b=Recipe(1500, 16, 1.2e-3),
                  c=Recipe(450, 64, 1.5e-3)),
    "cifar": dict(text=Recipe(400, 64, 5e-4), a=Recipe(1000, 32, 6e-3), b=Recipe(2000, 64, 1.6e-3),
                  c=Recipe(3500, 128, 1.5e-3)),
    "photos": dict(text=Recipe(400, 64, 5e-4), a=Recipe(800, 16, 6e-3), b=Recipe(2200, 32, 1.6e-3),
                   c=Recipe(1400, 64, 1.5e-3)),
    "small": dict(text=Recipe(20_000, 256, 5e-4), a=Recipe(40_000, 32, 3e-4), b=Recipe(100_000, 64, 2e-4),
                  c=Recipe(100_000, 256, 2e-4)),
    # The paper's numbers for its first phase (at 512 px: --image-size 512); those of the text encoder are ours.
    "v2": dict(text=Recipe(200_000, 1024, 1e-4), a=Recipe(500_000, 256, 1e-4), b=Recipe(457_000, 512, 1e-4),
               c=Recipe(500_000, 1536, 1e-4)),
}

# ----------------------------------------------------------------------------------------------------------------------
# The losses of Stages A, B and C. The text encoder's is `contrastive_loss` in wuerstchen.py; B's and C's call
# `diffusion_loss` there.


def vqgan_loss(vqgan, discriminator, images, adversarial):
    """Stage A's loss (appendix E.1, but with other terms; the paper's are MSE + 0.1·perceptual + 0.01·adversarial):

        loss_gen = 10·MSE + L1 + quantizer's loss − 0.005·D(reconstruction)
        loss_disc = max(0, 1 − D(images)) + max(0, 1 + D(reconstruction))        (hinge)

    images (B, H, W, 3) in [0, 1]; adversarial: whether the terms with the discriminator D are already used
    -> loss_gen, loss_disc (0 if not adversarial), mse, latents (B, h, w, 4), codes (B, h, w)"""
    reconstruction, latents, codes, vq_loss = vqgan(images)
    mse = F.mse_loss(reconstruction, images)
    loss_gen = 10 * mse + F.l1_loss(reconstruction, images) + vq_loss
    loss_disc = torch.zeros((), device=images.device)
    if adversarial:
        # One backward pass serves both losses: the gradient of loss_gen must not reach D's weights, and the gradient
        # of loss_disc must not reach the generator's.
        discriminator.requires_grad_(False)
        loss_gen = loss_gen - 0.005 * discriminator(reconstruction).mean()
        discriminator.requires_grad_(True)
        loss_disc = F.relu(1 - discriminator(images)).mean() + F.relu(1 + discriminator(reconstruction.detach())).mean()
    return loss_gen, loss_disc, mse, latents.detach(), codes


def noisy_conditions(semantic, text, null_text):
    """Stage B's conditions in training: the text and the semantic latents e. Training changes both, so that B can also
    generate when one or both are missing, and tolerate the errors in Stage C's e:

        text: replaced by the null caption for 25% of the images (the authors: 5%)
        e: noised at a random time in [0, 0.5] for 10% of the images that keep their caption (the authors: in
           30% of the batches, whether or not captions are dropped); after that, zeroed for 5% of all images

    Each choice has a `bernoulli_mask` of its own.

    We drop so many captions because those of Shapes describe nearly everything in an image: otherwise, B would read
    them instead of e. Where the caption is dropped, e is B's only condition, so it is not noised there.

    semantic: e (B, hs, ws, 16); text (B, L, width); null_text (1, L, width): the encoded null caption, which is the
    empty string (`Run.encode`)
    -> e (B, hs, ws, 16), text (B, L, width)"""
    drop_text = bernoulli_mask(0.25, text)
    text = torch.where(drop_text, null_text, text)
    noised = add_noise(semantic, torch.randn_like(semantic), torch.rand(len(text), device=text.device) / 2)
    noise_semantic = bernoulli_mask(0.1, semantic) & ~drop_text[..., None]
    drop_semantic = bernoulli_mask(0.05, semantic)
    semantic = torch.where(noise_semantic, noised, semantic)
    return torch.where(drop_semantic, 0, semantic), text


def stage_b_loss(b, compressor, scale, resized, latents, text, null_text):
    """Stage B's and the compressor's loss (appendix E.2): diffusion_loss of eps in noised latents, given the text and
    the semantic latents e as `noisy_conditions` gives them. With two changes, B learns to use e in fewer steps:

        times around 0.7 are the most frequent: t = sigmoid(0.5 + normal noise) (the authors': `training_times`)
        besides the P2 weight, the loss has the factor 0.4/√(ᾱ(t) + 0.02); the 0.4 keeps the mean weight about the same

    At such times, noise hides the shapes in the latents, but wrong guesses still raise the loss, so B must read e.
    resized: what the compressor sees (B, rescale·H, rescale·W, 3), in [0, 1]; latents: Stage A's (B, h, w, 4), not yet
    divided by scale; the rest as in `noisy_conditions`
    -> each image's loss and its time, (B,) each"""
    semantic = compressor(resized).float()  # (B, hs, ws, 16); the compressor has no loss but this one
    semantic, text = noisy_conditions(semantic, text, null_text)
    x0 = latents / scale                                             # (B, h, w, 4)
    t = torch.sigmoid(0.5 + torch.randn(len(x0), device=x0.device))  # (B,)
    eps = torch.randn_like(x0)                                       # (B, h, w, 4)
    predicted = b(add_noise(x0, eps, t), t, semantic, text)          # (B, h, w, 4)
    factor = 0.4 / (alpha_bar(t) + 0.02).sqrt()                      # (B,)
    return diffusion_loss(eps, predicted, t, factor), t


def token_stage_b_loss(b, compressor, resized, codes, text, null_text):
    """The loss of the paper's first version: `token_loss` of Stage A's codes (B, h, w), each of which is replaced by a
    random one with probability t; the rest as in `stage_b_loss`"""
    semantic, text = noisy_conditions(compressor(resized).float(), text, null_text)
    t = training_times(len(codes), codes.device)
    noisy, replaced = replace_tokens(codes, torch.randint_like(codes, len(b.tokens.weight)), t)
    return token_loss(b(noisy, t, semantic, text), codes, replaced, t), t


def stage_c_loss(c, semantic, text, null_text):
    """Stage C's loss (section 3.2, appendix E.3): diffusion_loss of eps in noised semantic latents, given the text. The
    null caption replaces 5% of the captions, as classifier-free guidance requires.
    semantic (B, hs, ws, 16), text (B, L, width), null_text (1, L, width)
    -> each image's loss and its time, (B,) each"""
    text = torch.where(bernoulli_mask(0.05, text), null_text, text)
    x0 = c.normalise(semantic)                  # (B, hs, ws, 16)
    t = training_times(len(x0), x0.device)      # (B,)
    eps = torch.randn_like(x0)                  # (B, hs, ws, 16)
    predicted = c(add_noise(x0, eps, t), t, text)
    return diffusion_loss(eps, predicted, t), t


def by_time(losses, t):
    """For the log: the batch's mean loss in each quarter of the time range; NaN for a quarter with no images."""
    quarter = (4 * t).long().clamp(max=3)
    return {f"loss_{25 * i}": torch.where(quarter == i, losses.detach(), math.nan).nanmean() for i in range(4)}


def bernoulli_mask(p, x):
    """True with probability p for each row of x (B, ...) -> bool (B, 1, ...)"""
    return torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) < p


# ----------------------------------------------------------------------------------------------------------------------
# The optimizer and the training loop, the same for all stages.


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with all singular values of the update brought near 1 (Jordan et al., 2024); for matrices only.
    All stages need far fewer training steps with it. torch.optim.Muon always multiplies in bfloat16; a CPU without
    bfloat16 emulates it, 40 times slower than float32. Here, `dtype` sets the precision, and `orthogonal` takes three
    Newton-Schulz steps instead of five."""

    def __init__(self, groups, dtype):
        super().__init__(groups, dict(lr=0.0, momentum=0.95, weight_decay=0.01))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"].lerp_(p.grad, 1 - group["momentum"])
                change = orthogonal(p.grad.lerp(mean, group["momentum"]), self.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # The factor gives changes about the size of AdamW's.
                p.sub_(change, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


NEWTON_SCHULZ = ((8.14, -23.04, 16.40), (3.852, -2.764, 0.5085), (3.159, -2.283, 0.4573))  # a, b, c of each step


def orthogonal(x, dtype):
    """Approximates the orthogonal matrix nearest to a matrix x (m, n) by three Newton-Schulz steps

        y <- a·y + (b·yyᵀ + c·(yyᵀ)²)·y

    which lower the ratio of the largest to the smallest singular value. Dividing by the norm makes all singular values
    at most 1, up to rounding. The three steps bring those in [0.005, 1.02] to [0.04, 1.96], then to [0.15, 1.84], then
    to [0.48, 1.51] (Amsel et al., 2025)."""
    tall = x.shape[0] > x.shape[1]
    y = (x / (x.norm() + 1e-7)).to(dtype)
    y = y.T if tall else y
    for a, b, c in NEWTON_SCHULZ:
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.T if tall else y).to(x.dtype)


def make_optimizers(network, lr_scale, dtype):
    """Muon for the weights of Linear layers with at least 64 rows and 64 columns; AdamW for all other parameters, with
    the betas of the authors' script for Stage B. lr_scale(name): the factor by which a parameter's learning rate is
    multiplied. Muon's is three times that. Each group keeps its factor as "lr_scale". -> a list of optimizers"""
    large = {m.weight for m in network.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) >= 64}
    adamw, muons = {}, {}  # factor -> group
    for name, p in network.named_parameters():
        groups, scale = (muons, 3 * lr_scale(name)) if p in large else (adamw, lr_scale(name))
        groups.setdefault(scale, dict(params=[], lr_scale=scale))["params"].append(p)
    optimizers = [torch.optim.AdamW([*adamw.values()], betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    return optimizers + [Muon([*muons.values()], dtype)] if muons else optimizers


def ema_update(averages, params, steps):
    """Exponential moving average of the weights over about the last tenth of the steps so far, but at most 1,000 steps
    (the authors: a decay of 0.9 every 100 steps). steps: the number of updates before this one"""
    torch._foreach_lerp_(averages, params, 1 - min(0.999, (1 + steps.item()) / (10 + steps.item())))


def learning_rate(recipe, step):
    """A linear warm-up, as in the authors' script; then a cosine decay to 0, which short runs need."""
    warm_up = min(10_000, recipe.steps // 20 + 1)
    return recipe.lr * min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))


def update(network, average, optimizers, scaler, lr):
    """Clips the gradient to norm 1, as the authors do, and takes a step of the optimizers and of the moving average.
    -> False if a gradient is NaN or inf; in that case, no step is taken"""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
    finite = nn.utils.clip_grad_norm_(network.parameters(), 1.0).isfinite()
    if finite:
        for optimizer in optimizers:
            scaler.step(optimizer)
        average.update_parameters(network)
    else:  # the forward pass has updated BatchNorm's statistics: restore the last good ones
        for good, buffer in zip(average.module.buffers(), network.buffers()):
            buffer.copy_(good)
    scaler.update()
    return finite


def checkpoint(path, parts, step, recipe):
    """Saves an unfinished stage. parts: {name: module, optimizer or scaler}"""
    save_atomically(path, dict(step=step, recipe=asdict(recipe),
                               **{name: part.state_dict() for name, part in parts.items()}))


def restore(path, parts, stage, recipe):
    """Loads into the parts what `checkpoint` saved. -> steps done"""
    state = load_file(path)
    for name, part in parts.items():
        if state[name]:  # a scaler's is empty unless the precision was float16
            load_state(part, state[name], path)
    if state["step"] > recipe.steps:
        raise UserError(f"{path} is from step {state['step']}: raise --steps to at least that, or delete the file")
    begun = state.get("recipe", asdict(recipe))
    changed = [f", {name} {value} (begun with {begun[name]})" for name, value in asdict(recipe).items()
               if value != begun[name]]
    print(f"stage {stage}: resuming from step {state['step']}{''.join(changed)}")
    return state["step"]


@torch.no_grad()
def test_loss(network, batches, loss_fn):
    """The mean loss on batches of test data. So that its values can be compared, it always uses the same seed and is
    computed as at step 0 (in Stage A: without the discriminator)."""
    torch.manual_seed(0)
    results = [loss_fn(network, batch, 0) for batch in batches]
    return torch.stack([numbers.get("loss", loss) for loss, numbers in results]).mean()


def write_sheet(run, name, average, preview):
    """Writes an image of eight test images, and below them what `preview` makes of them, to the run's sheets/."""
    images, captions = examples(run.test_data, 8)
    rows = preview(average, images.to(run.device), captions)
    make_sheet([images, *rows], captions).save(run.folder / "sheets" / name)


def fit(run, stage, network, batches, loss_fn, preview=None, test_batches=(), lr_scale=lambda name: 1):
    """Trains a network and returns the moving average of its weights, as a network. Every --save-every steps, it writes
    a checkpoint. After Ctrl-C or a crash, the next call resumes from there and, on a CPU, ends with the same weights,
    bit for bit, as an uninterrupted run. No random state is saved: all random numbers are derived from the seed and the
    number of the step or the image.

    batches(first, recipe) yields batches from step `first` on;
    loss_fn(network, batch, step) -> the loss to minimise, and a dictionary of numbers to log; if it has a "loss", that
    is logged instead of the one minimised. It must use this network, not run.model's: for the test loss, it is called
    with the average;
    preview(average, images, captions) -> rows of images for a sheet;
    test_batches: batches of test data, for `test_loss`;
    lr_scale: see `make_optimizers`."""
    args, recipe, path = run.args, run.recipe(stage), run.folder / f"{stage}.ckpt"
    average = AveragedModel(network, multi_avg_fn=ema_update).eval().requires_grad_(False)
    network.train()
    optimizers = make_optimizers(network, lr_scale,
                                 torch.bfloat16 if run.precision == "bfloat16" else torch.float32)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "float16")
    parts = dict(network=network, average=average, scaler=scaler, **dict(zip(("adamw", "muon"), optimizers)))
    step = restore(path, parts, stage, recipe) if path.exists() else 0
    for module in network.modules():
        if args.compile and isinstance(module, (StageB, StageC)):
            module.compile()

    start, first, skipped = time.time(), step, 0
    bar = tqdm(batches(step, recipe), f"stage {stage}", recipe.steps, initial=step, unit="step")
    for batch in bar:
        torch.manual_seed(1 + args.seed * recipe.steps + step)  # one seed per step: a resumed run has the same noise
        network.zero_grad()
        with run.autocast():
            loss, numbers = loss_fn(network, batch, step)
        scaler.scale(loss).backward()
        lr = learning_rate(recipe, step)
        finite = update(network, average, optimizers, scaler, lr)
        step += 1

        skipped = 0 if finite else skipped + 1
        if skipped:
            print(f"stage {stage}: skipped step {step} because its gradient is NaN or inf", file=sys.stderr)
        if skipped == 10:
            raise UserError(f"stage {stage}: no finite gradient in 10 consecutive steps; a lower --lr may help")
        shown = step % args.save_every == 0 or step == recipe.steps
        if shown and test_batches:
            with run.autocast():
                numbers["test_loss"] = test_loss(average.module, test_batches, loss_fn)
        if step % args.log_every == 0 or shown:
            speed, numbers = (step - first) * recipe.batch / (time.time() - start), {"loss": loss, **numbers}
            bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {speed:.0f} images/s")
            run.log(stage=stage, step=step, lr=lr, images_per_s=speed, **numbers)
        if shown and preview:
            write_sheet(run, f"{stage}_{step:06d}.png", average.module, preview)
        if step % args.save_every == 0:
            checkpoint(path, parts, step, recipe)
    return average.module


# ----------------------------------------------------------------------------------------------------------------------
# The stages.


class Run:
    """What every stage needs: the options, the data, the networks so far, the log."""

    def __init__(self, args, data):
        self.args, self.device, self.folder = args, torch.device(pick_device(args.device)), Path(args.run)
        self.precision = args.precision or pick_precision(self.device.type)
        self.train_data, self.test_data = data["train"], data["test"]
        (self.folder / "sheets").mkdir(exist_ok=True)
        self.model, self.pretrained = None, False  # pretrained: the stage continues from the weights of --init-from

    def recipe(self, stage):
        """Each value comes from the command; else from the checkpoint of an unfinished stage; else from the preset."""
        path, begun = self.folder / f"{stage}.ckpt", RECIPES[self.args.preset][stage]
        if path.exists():  # memory-mapped: reads no weights
            begun = Recipe(**load_file(path, mmap=True).get("recipe", asdict(begun)))
        given = dict(steps=self.args.steps, batch=self.args.batch_size, lr=self.args.lr)
        return replace(begun, **{name: value for name, value in given.items() if value is not None})

    def autocast(self):
        """Matrix products in the run's precision, and attention by the kernel that is faster with it."""
        return computing(self.device.type, self.precision, plain_attention(self.device.type, self.precision))

    def use(self, average):
        """Puts averaged networks {name: network} into the model, which samples as a whole."""
        for name, network in average.items():
            setattr(self.model, name, network)

    def log(self, **numbers):
        """Adds a line to metrics.jsonl. Numbers that are NaN are left out, except "loss" and "test_loss"."""
        numbers = {key: x.item() if torch.is_tensor(x) else x for key, x in numbers.items()}
        numbers = {key: x for key, x in numbers.items() if x == x or key in ("loss", "test_loss")}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(numbers) + "\n")

    def load(self, numbers, size):
        """For each n in `numbers`, the n-th batch of training images: (size, H, W, 3) in [0, 1], and each image's
        captions, one per line."""
        indices = (range(n * size, (n + 1) * size) for n in numbers)
        for images, texts in DataLoader(self.train_data, batch_sampler=indices, num_workers=self.args.workers,
                                        generator=torch.Generator(),  # else it draws from the global one
                                        pin_memory=self.device.type == "cuda"):
            yield images.to(self.device, non_blocking=True) / 255, list(texts)

    def batches(self, first, recipe):
        """The training batches from step `first` on: images (B, H, W, 3) in [0, 1], mirrored at random with --flip, and
        one caption for each"""
        steps = range(first, recipe.steps)
        for step, (images, texts) in zip(steps, self.load(steps, recipe.batch)):
            rngs = [np.random.default_rng((self.args.seed, 1, step * recipe.batch + i)) for i in range(recipe.batch)]
            if self.args.flip:
                images = torch.stack([mirror(image, text) if rng.random() < 0.5 else image
                                      for image, text, rng in zip(images, texts, rngs)])
            yield images, list(map(pick, texts, rngs))

    def encode(self, encoder, captions, stage="b"):
        """-> the encoded captions (B, L, width) and the encoded null caption (1, L, width). Published stages have their
        own tokenizers."""
        tokenizer = self.model.tokenizer if stage == "c" else self.model.tokenizer_b
        text = encoder(*(x.to(self.device) for x in tokenizer([*captions, ""])))
        return text[:-1], text[-1:]

    def cached(self, name, made_from, compute):
        """Runs compute(images) -> {key: tensor (B, ...)} (see `train_b` and `train_c`) once on the first --cache
        training images in their shuffled order (rounded up to batches of 16) or, without --cache, on all images of a
        data set on disk. With --flip, it also runs on their mirror images. The results are kept in cache/<name>/. They
        are computed again if they are incomplete, or older than options.json or `made_from`, the file of the stage they
        depend on. Every stage deletes cache/ when it is finished, so the cache only helps to resume an interrupted
        stage.
        -> {key: memory-mapped array (N, ...)}, and "captions", N strings: those of an image, one per line"""
        folder = self.folder / "cache" / name
        complete = folder / "captions.json"  # written last
        newest = max((self.folder / file).stat().st_mtime for file in (made_from, "options.json"))
        if not complete.exists() or complete.stat().st_mtime < newest:
            arrays, texts = {}, []
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            count = len(self.train_data.items) if isinstance(self.train_data, Images) else math.inf
            steps = math.ceil(min(self.args.cache or count, count) / 16)
            for images, own in tqdm(self.load(range(steps), 16), f"cache for {name}", steps):
                if self.args.flip:
                    images, own = torch.cat([images, torch.stack([*map(mirror, images, own)])]), 2 * own
                with torch.no_grad(), self.autocast():
                    found = {key: x.cpu().numpy() for key, x in compute(images).items()}
                if not arrays:  # the first batch
                    needed, free = steps * sum(x.nbytes for x in found.values()), shutil.disk_usage(folder).free
                    if needed > free:  # later, a full disk would kill the process: memory maps raise no error
                        raise UserError(f"{folder} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB is free: "
                                        "give a smaller --cache")
                    arrays = {key: np.lib.format.open_memmap(folder / f"{key}.npy", "w+", x.dtype,
                                                             (steps * len(x), *x.shape[1:]))
                              for key, x in found.items()}
                for key, x in found.items():
                    arrays[key][len(texts):len(texts) + len(x)] = x
                texts += own
            save_atomically(complete, json.dumps(texts))
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        return arrays | {"captions": read_json(complete)}

    def test_batches(self, stage, compute=None):
        """The first 64 test images, in batches of the stage's batch size, but of at most 64. All batches are full, so
        the last one may also contain later images. Each batch has the form that `batches` yields or, with compute, the
        form that `cached_batches` yields."""
        size, found = min(64, self.recipe(stage).batch), []
        for start in range(0, 64, size):
            images, captions = examples(self.test_data, size, start)
            images = images.to(self.device)
            with torch.no_grad(), self.autocast():
                found.append(compute(images) | {"captions": captions} if compute else (images, captions))
        return found

    def cached_batches(self, arrays):
        """A `batches` for `fit`: random rows of what `cached` returns, as a dictionary of tensors, with one caption for
        each row"""
        def batches(first, recipe):
            for step in range(first, recipe.steps):
                rng = np.random.default_rng((self.args.seed, step))
                rows = rng.integers(len(arrays["captions"]), size=recipe.batch)
                yield {key: [pick(x[i], rng) for i in rows] if key == "captions" else
                       torch.from_numpy(x[rows]).to(self.device) for key, x in arrays.items()}
        return batches


def pick(text, rng):
    """One of an image's captions, at random."""
    return str(rng.choice(text.splitlines()))


def mirror(image, text):
    """The mirror image (H, W, 3); the image itself if its captions say left or right."""
    return image if re.search(r"\b(left|right)\b", text.lower()) else image.flip(1)


def train_tokenizer(captions, config):
    """Learns byte-pair merges from the training captions, until the vocabulary is full or no pair occurs more than
    once. The tokenizer's length is then that of the longest of these captions, start and end tokens included, but at
    most the preset's `length`."""
    tokenizer = Tokenizer.train(captions, config.text_c.vocab_size - 514)  # bytes, bytes that end a word, start, end
    tokenizer.length = min(config.text_c.length, 2 + max(len(tokenizer.encode(one)) for one in set(captions)))
    return tokenizer


def words_between(captions):
    """-> {(word, another): the words that stand between these two in some caption}; "" stands before the first word and
    after the last"""
    between = {}
    for caption in captions:
        words = ["", *caption.lower().split(), ""]
        for before, word, after in zip(words, words[1:], words[2:]):
            between.setdefault((before, after), set()).add(word)
    return between


def words_read(caption, tokenizer):
    """The first words of a caption, as many as fit into the text encoder's input -> str"""
    if not tokenizer.overflow(caption):
        return caption
    words = caption.split()[:tokenizer.length]
    ends = itertools.accumulate(len(tokenizer.encode(word)) for word in words)
    return " ".join(word for word, end in zip(words, ends) if end <= tokenizer.length - 2)


def hard_negatives(caption, between, rng):
    """Captions close to the real one, but nearly always wrong: one with a word replaced, one with two words swapped. A
    word is put between two others only if some training caption has it there (`words_between`). Random swaps would
    mostly be ungrammatical, and CLIP could reject them without looking at the image. A wrong caption that is
    `reserved` for testing is left out, so that Shapes' test captions stay unseen. With other data sets, this merely
    loses one wrong caption in sixteen.
    caption: from `words_read`, between: from `words_between` -> 0 to 2 captions"""
    words = ["", *caption.lower().split(), ""]
    others = {i: between.get((words[i - 1], words[i + 1]), set()) - {words[i]} for i in range(1, len(words) - 1)}
    changes = []
    if replaceable := [i for i in others if others[i]]:
        i = rng.choice(replaceable)
        changes.append({i: rng.choice(sorted(others[i]))})
    # Adjacent words are never swapped, because that would change the neighbours of both.
    if swaps := [{i: words[j], j: words[i]} for i in others for j in others
                 if j > i + 1 and words[j] in others[i] and words[i] in others[j]]:
        changes.append(rng.choice(swaps))
    wrong = (" ".join(change.get(i, words[i]) for i in others) for change in changes)
    return [other for other in wrong if not reserved(other)]


def train_text(run):
    """Trains the text encoder contrastively, together with an image encoder. (The authors use OpenCLIP's text encoder,
    which was trained this way.)

    With random negatives, CLIP can reach a low loss by matching words, without ever learning which colour belongs to
    which shape (Yuksekgonul et al., 2023). So we add hard negatives."""
    between, tokenizer = words_between(run.train_data.captions()), run.model.tokenizer_b

    def loss_fn(clip, batch, step):
        images, captions = batch
        rng = np.random.default_rng((run.args.seed, step))
        negatives = [wrong for caption in captions
                     for wrong in hard_negatives(words_read(caption, tokenizer), between, rng)]
        ids, mask = (x.to(run.device) for x in tokenizer(captions + negatives))
        return contrastive_loss(clip(images, ids, mask), ids), {}

    clip = CLIP(run.model.config)
    clip.text, clip.image = run.model.text_b, run.model.compressor.backbone  # B's compressor starts from this backbone
    if run.pretrained and (path := run.folder / "clip.pt").exists():
        load_state(clip, load_file(path), path)
    clip = fit(run, "text", clip.to(run.device), run.batches, loss_fn, test_batches=run.test_batches("text"))
    run.model.text_b, run.model.compressor.backbone = clip.text, clip.image
    save_atomically(run.folder / "clip.pt", clip.state_dict())


def train_a(run):
    """Trains the VQGAN on small crops. At the presets' image sizes, they add up to a quarter of each image. The VQGAN's
    receptive field is small, so crops are enough. Borders must be learned separately: there, a transposed convolution
    sums only half of its terms, and in a corner only a quarter. Crops help here: more of their area is border. The
    discriminator joins for the last quarter of the steps, when the images are good enough to be refined."""
    cfg, steps, size = run.model.config.a, run.recipe("a").steps, run.model.config.image_size
    side = max(32, size // 4)
    crops = max(1, size // (2 * side)) ** 2
    depth = min(cfg.disc_depth, side.bit_length() - 2)  # leaves at least 2x2 patches, which InstanceNorm needs
    network = nn.ModuleDict(dict(a=run.model.a, discriminator=Discriminator(depth, cfg.disc_width)))
    # A buffer, so that it is in the checkpoint.
    network.register_buffer("idle", torch.full((cfg.codebook_size,), 0.0 if run.pretrained else math.inf))

    def loss_fn(network, batch, step):
        images = torch.cat([crop(batch[0], side) for _ in range(crops)])
        loss_gen, loss_disc, mse, latents, codes = vqgan_loss(network["a"], network["discriminator"], images,
                                                              adversarial=network.training and step >= 3 * steps // 4)
        moved = revive_codes(network["a"].quantizer.codebook, latents, codes, network.idle) if network.training else 0
        return loss_gen + loss_disc, dict(loss=loss_gen, loss_disc=loss_disc, mse=mse, revived_codes=moved)

    # A codebook vector has a gradient only when chosen, but must follow moving latents: hence a higher learning rate.
    average = fit(run, "a", network.to(run.device), run.batches, loss_fn, test_batches=run.test_batches("a"),
                  preview=lambda average, images, captions: [average["a"](images)[0]],
                  lr_scale=lambda name: 5 if name.endswith("codebook") else 1)
    run.model.a = average["a"]
    set_scale(run)


def crop(images, side):
    """A random square, at the same place in all images, aligned to Stage A's grid.
    (B, H, W, 3) -> (B, side, side, 3)"""
    top, left = (4 * int(torch.randint((n - side) // 4 + 1, ())) for n in images.shape[1:3])
    return images[:, top:top + side, left:left + side]


@torch.no_grad()
def revive_codes(codebook, latents, codes, idle, patience=50):
    """Moves each codebook vector that has not been chosen for `patience` steps onto a random latent of the batch, so
    that the codebook can't collapse. latents (B, h, w, 4), codes (B, h, w); idle (codebook_size,): steps since each
    vector was last chosen, updated here; at first inf, so that every vector that the first batch does not choose is
    moved at once (for pretrained weights, 0)
    -> how many were moved"""
    idle += 1
    idle[codes.unique()] = 0
    dead = (idle >= patience).nonzero()[:, 0]
    latents = latents.float().flatten(0, 2)
    if not latents.isfinite().all():
        return 0
    codebook[dead] = latents[torch.randint(len(latents), (len(dead),), device=latents.device)]
    idle[dead] = 0
    return len(dead)


@torch.no_grad()
def set_scale(run):
    """Stage A's `scale`: 2.4 times its latents' standard deviation. Dividing by it lets noise hide large shapes over a
    wider range of times, so B learns to read their position and colour from the semantic latents. Below 128 px, shapes
    cover fewer latents, so noise hides them at smaller t anyway: there, 2.4 is reduced in proportion to the side."""
    images, _ = examples(run.train_data, 256)
    deviation = torch.cat([run.model.a.encode(some.to(run.device)) for some in images.split(32)]).std()
    run.model.a.scale.fill_(2.4 * min(1, run.model.config.image_size / 128) * deviation)


def train_b(run):
    """Trains Stage B and the semantic compressor jointly, so that the compressor keeps what helps B to generate."""
    model, tokens = run.model, run.model.config.b.token_width > 0

    def compute(images):  # Stage A no longer changes
        latents = model.a.encode(images)
        return dict(resized=(rescaled(images, model.config.rescale).clamp(0, 1) * 255).round().byte(),
                    latents=model.a.quantizer(latents)[1].int() if tokens else latents.half())

    arrays = run.cached("b", "a.pt", compute)
    if not run.pretrained:
        init_mapper(model.compressor, (torch.tensor(arrays["resized"][:1024]).to(run.device) / 255).split(32))
    network = nn.ModuleDict(dict(compressor=model.compressor, b=model.b))

    def loss_fn(network, batch, step):
        b, compressor, resized = network["b"], network["compressor"], batch["resized"] / 255
        with torch.no_grad():
            text, null_text = run.encode(model.text_b, batch["captions"])
        if tokens:
            losses, t = token_stage_b_loss(b, compressor, resized, codes=batch["latents"].long(), text=text,
                                           null_text=null_text)
        else:
            losses, t = stage_b_loss(b, compressor, model.a.scale, resized, latents=batch["latents"].float(), text=text,
                                     null_text=null_text)
        return losses.mean(), by_time(losses, t)

    def preview(average, images, captions):
        run.use(average)
        return model.reconstruct(images, captions, seed=0)

    # The compressor starts from CLIP's image encoder and moves slowly, so that B can learn to read it.
    run.use(fit(run, "b", network, run.cached_batches(arrays), loss_fn, preview=preview,
                test_batches=run.test_batches("b", compute),
                lr_scale=lambda name: 0.2 if name.startswith("compressor") else 1))


@torch.no_grad()
def init_mapper(compressor, batches):
    """Initialises the compressor's mapper with the principal components of its backbone's features. With random
    directions, details of shapes would be lost. batches: list of batches of resized images (B, h, w, 3) in [0, 1]"""
    features = torch.cat([compressor.backbone(images) for images in batches])
    features = features.flatten(0, 2).cpu().double()  # float32 fails if all are alike; MPS has neither eigh nor float64
    _, directions = torch.linalg.eigh(features.T.cov())  # by increasing variance
    compressor.mapper.weight.copy_(directions[:, -len(compressor.mapper.weight):].T)


def train_c(run):
    """Trains Stage C on semantic latents that are computed once. Its text encoder is trained too, since ours has seen
    few captions. If it stays frozen, fewer images come out right. --freeze-text freezes it anyway, as in the paper."""
    model, frozen = run.model, run.args.freeze_text
    if not run.pretrained:
        model.text_c = copy.deepcopy(model.text_b)

    def compute(images):
        return dict(semantic=model.compress(images))

    arrays = run.cached("c", "b.pt", compute)
    # The mean and the standard deviation are measured again even for pretrained weights, because they depend on the
    # image size. The deviation is clipped because that of a constant channel is 0.
    statistics = dict(axis=(0, 1, 2), dtype=np.float64)  # sums of many float32 numbers would lose digits
    model.c.latent_mean.copy_(torch.from_numpy(arrays["semantic"].mean(**statistics)))
    model.c.latent_std.copy_(torch.from_numpy(arrays["semantic"].std(**statistics).clip(1e-3)))
    model.text_c.requires_grad_(not frozen)
    network = nn.ModuleDict(dict(text_c=model.text_c, c=model.c))

    def loss_fn(network, batch, step):
        losses, t = stage_c_loss(network["c"], batch["semantic"],
                                 *run.encode(network["text_c"], batch["captions"], "c"))
        return losses.mean(), by_time(losses, t)

    def preview(average, images, captions):
        run.use(average)
        return [*model.reconstruct(images, seed=0, guidance=1), model.generate(captions, seed=0)]

    run.use(fit(run, "c", network, run.cached_batches(arrays), loss_fn, preview=preview,
                test_batches=run.test_batches("c", compute),
                lr_scale=lambda name: 0.1 if name.startswith("text") else 1))  # at the full rate, it would forget


TRAIN = {"text": train_text, "a": train_a, "b": train_b, "c": train_c}
NEEDS = {"text": (), "a": (), "b": ("text", "a"), "c": ("text", "a", "b")}

# ----------------------------------------------------------------------------------------------------------------------
# Data. A data set has
#
#     data[i]            for any i >= 0: an image, uint8 array (size, size, 3), and its captions, one string with a
#                        caption per line. Both depend only on i and the seed, so a step number is enough to resume.
#     data.captions()    the captions for the tokenizer and for hard negatives; finite, unlike data[i]
#
# To add one,
#
#     1. add its name to the choices of --data in `parse_args` (by default, it gets the preset "photos", and its images
#        are mirrored);
#     2. for images in files or arrays: write a reader that takes and returns what `list_cifar` does, and call it beside
#        `list_cifar` in `open_data`; `Images` does the rest;
#     3. for anything else, instead of 2: write a class, and let `open_data` return {"train": ..., "test": ...}, two
#        objects of it. Then give --cache with the first command, since only `Images` knows how many images there are.
#        If the class needs no files, treat it like "shapes" where --data-dir is checked.
#
# First comes Shapes, rendered on the fly: "a big blue square to the left of a small green star".

COLOURS = {"red": (215, 35, 35), "orange": (250, 135, 20), "yellow": (250, 225, 40), "green": (40, 160, 60),
           "cyan": (40, 210, 225), "blue": (40, 75, 220), "purple": (130, 40, 170), "pink": (250, 130, 190)}
BACKGROUNDS = {"white": (243, 243, 243), "grey": (150, 150, 150), "dark": (35, 35, 38)}
# Radius range as a share of the image's side: 16-18 and 24-26 pixels of 128.
SIZES = {"small": (0.125, 0.14), "big": (0.185, 0.2)}
# Unit step from the second object to the first (x to the right, y down).
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# Never shown in training: one pair per shape, five different colours. A model must combine them by itself.
HELD_OUT = {("purple", "circle"), ("yellow", "square"), ("cyan", "triangle"), ("red", "star"), ("green", "cross")}
SPLITS = ("train", "test", "heldout")
JITTER = 0.015  # largest random offset of an object's centre, as a share of the side; twice that for a single object
TINT = {"object": 10, "background": 3}  # largest change of a colour channel, of 255


def ring(n, radius, start=-90):
    """n points on a circle, the first at the angle `start` (-90: straight up): (n, 2) array of x, y."""
    angle = np.radians(start + 360 / n * np.arange(n))
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


# Outlines for radius 1. A square fills its box and a star does not; their extents differ so that they look equally big.
OUTLINES = {
    "circle": ring(48, 0.95),
    "square": ring(4, 0.85 * math.sqrt(2), start=-45),
    "triangle": ring(3, 1.2) + (0, 0.3),  # moved down so that its box, not its centroid, is in the middle
    "star": np.stack([ring(5, 1.12), ring(5, 0.47, start=-54)], axis=1).reshape(10, 2) + (0, 0.1),
    "cross": np.array([(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1),
                       (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]) / 3.0,
}
REACH = {shape: float(np.abs(points).max()) for shape, points in OUTLINES.items()}  # half of the longer side


@dataclass
class Scene:
    objects: list            # one or two (size or None, colour, shape)
    relation: str = None     # of the first object to the second; None for one object
    background: str = None   # None: white

    def caption(self):
        names = []
        for size, colour, shape in self.objects:
            words = " ".join(filter(None, (size, colour, shape)))
            names.append(("an " if words[0] == "o" else "a ") + words)  # only "orange" begins with a vowel
        text = f" {self.relation} ".join(names)
        return text + (f" on a {self.background} background" if self.background else "")


def random_scene(rng):
    """40% one object, 60% two; size and background are named in some captions only."""
    def one_of(names):
        return list(names)[rng.integers(len(names))]

    def thing():
        return one_of(SIZES) if rng.random() < 0.75 else None, one_of(COLOURS), one_of(OUTLINES)

    background = one_of(BACKGROUNDS) if rng.random() < 0.3 else None
    first = thing()
    if rng.random() < 0.4:
        return Scene([first], None, background)
    second = thing()
    while second[1:] == first[1:]:
        second = thing()
    return Scene([first, second], one_of(RELATIONS), background)


def reserved(caption):
    """Whether a caption is kept for testing: one in sixteen, by a hash."""
    return zlib.crc32(caption.encode()) % 16 == 0


def split_of(scene):
    """The one split a scene's caption belongs to."""
    if any((colour, shape) in HELD_OUT for _, colour, shape in scene.objects):
        return "heldout"
    return "test" if reserved(scene.caption()) else "train"


def place(scene, rng):
    """Centres (x, y) of the objects as shares of the side. A single object is in the middle; each of two objects is in
    the middle of its half, so that even big ones don't touch. All have a random offset."""
    step = np.array(RELATIONS.get(scene.relation, (0, 0)))
    steps = [step, -step] if scene.relation else [step]
    return [0.5 + 0.25 * step + rng.uniform(-JITTER, JITTER, size=2) * 2 / len(steps) for step in steps]


def draw(scene, rng, size=128):
    """An image of the scene: uint8 array (size, size, 3). Exact positions and tints are random, and so is a size that
    the scene leaves open; if it names no background, the background is white."""
    def tinted(rgb, most):
        return tuple(int(v) for v in np.clip(np.add(rgb, rng.integers(-most, most + 1, size=3)), 0, 255))

    background = scene.background or "white"
    image = Image.new("RGB", (size, size), tinted(BACKGROUNDS[background], TINT["background"]))
    radii = [rng.uniform(*SIZES[name or ("small", "big")[rng.integers(2)]]) for name, _, _ in scene.objects]
    for (_, colour, shape), radius, (x, y) in zip(scene.objects, radii, place(scene, rng)):
        # Smooth edges: draw only the object's own box, four times as large, and reduce it.
        r = radius * REACH[shape]
        left, top, side = int((x - r) * size), int((y - r) * size), int(2 * r * size) + 3
        outline = (np.array([x, y]) + radius * OUTLINES[shape]) * size - (left, top)
        mask = Image.new("L", (4 * side, 4 * side))
        ImageDraw.Draw(mask).polygon((4 * outline - 0.5).ravel().tolist(), fill=255)
        image.paste(tinted(COLOURS[colour], TINT["object"]), (left, top, left + side, top + side), mask.reduce(4))
    return np.array(image)


class Shapes(Dataset):
    """split: "train"; "test", captions never trained on; "heldout", captions with a pair of HELD_OUT."""

    def __init__(self, size=128, seed=0, split="train"):
        self.size, self.seed, self.split = size, seed, split

    def start(self, index):
        """-> the scene of an image, and the random generator to draw it with"""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        while split_of(scene := random_scene(rng)) != self.split:
            pass
        return scene, rng

    def caption(self, index):
        return self.start(index)[0].caption()

    def captions(self):
        """Captions to train a tokenizer on."""
        return map(self.caption, range(20_000))

    def __getitem__(self, index):
        scene, rng = self.start(index)
        return draw(scene, rng, self.size), scene.caption()


# Data sets on disk. `open_data` makes {split: [(image, captions)]} of each; `Images` repeats that forever, shuffled.
# What can't be used goes to `left_out`, {reason: [names]}, and is printed.

TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "a small photo of a {}")
DOWNLOADS = {  # the archives of a data set, and their SHA-256
    "cifar10": {"https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz":
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
    "cifar100": {"https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz":
                 "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"},
    "coco": {"http://images.cocodataset.org/annotations/annotations_trainval2017.zip":
             "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
             "http://images.cocodataset.org/zips/val2017.zip":
             "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"},
}
COCO_IMAGES = 5000  # in val2017.zip
CIFAR = {  # folder, bytes of labels before the pixels (we use the last), names of the labels, records in each file
    "cifar10": ("cifar-10-batches-bin", 1, "batches.meta.txt",
                {"test_batch.bin": 10_000} | {f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}),
    "cifar100": ("cifar-100-binary", 2, "fine_label_names.txt", {"test.bin": 10_000, "train.bin": 50_000}),
}


def is_complete(data, data_dir):
    """Whether all that --download fetches is there, unpacked."""
    if data == "coco":
        return (len([*(data_dir / "val2017").glob("*.jpg")]) >= COCO_IMAGES
                and (data_dir / "annotations" / "captions_val2017.json").exists())
    folder, skip, names, files = CIFAR[data]
    sizes = {data_dir / folder / name: n * (skip + 3072) for name, n in files.items()}
    return (data_dir / folder / names).exists() and all(
        path.exists() and path.stat().st_size == size for path, size in sizes.items())


def download(data, data_dir):
    """Fetches the archives of a data set into a folder, checks their SHA-256 and unpacks them. Does nothing if their
    contents are already there; does not fetch an archive that is already there."""
    if is_complete(data, data_dir):
        return
    data_dir.mkdir(parents=True, exist_ok=True)
    for url, sha256 in DOWNLOADS[data].items():
        archive = data_dir / url.rsplit("/", 1)[-1]
        if not archive.exists() or hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
            try:
                torch.hub.download_url_to_file(url, archive, hash_prefix=sha256)
            except Exception as error:  # of many kinds: no network, another hash
                raise OSError(f"can't fetch {url}: {error}") from error
        shutil.unpack_archive(archive, data_dir)


def list_cifar(data, data_dir, left_out):
    """CIFAR-10 or CIFAR-100, binary version, or some of its files: data_dir holds cifar-10-batches-bin/ or
    cifar-100-binary/. A record is its labels, then 32x32 red, green and blue values.
    -> {split: [(array (32, 32, 3), captions)]}"""
    folder, skip, names, files = CIFAR[data]
    place, items, captions = data_dir / folder, dict(train=[], test=[]), []
    if not place.is_dir():
        python = [f", only {path.name}, the Python version" for path in data_dir.glob("cifar-*py*") if path.is_dir()]
        raise UserError(f"no {place}{''.join(python)}: --data-dir must be the folder that holds {folder}; "
                        "--download fetches the binary version")
    for name in read_text(place / names).replace("_", " ").splitlines():
        article = "an" if name[:1] in "aeiou" else "a"
        captions.append([line.replace("a {}", article + " {}").format(name) for line in TEMPLATES])
    for name, n in files.items():
        data = np.fromfile(place / name, np.uint8) if (place / name).exists() else np.zeros(0, np.uint8)
        if len(data) % (skip + 3072) or (data[skip - 1::skip + 3072] >= len(captions)).any():
            raise UserError(f"{place / name} is cut short or damaged: --download restores it if you delete it first")
        records = data.reshape(-1, skip + 3072)
        items["test" if "test" in name else "train"] += [
            (record[skip:].reshape(3, 32, 32).transpose(1, 2, 0), captions[record[skip - 1]]) for record in records]
        if len(records) < n:
            left_out["missing or incomplete files"].append(name)
    return items


def tidy(texts):
    """A text or a list of texts -> captions, each on one line; drops empty ones and whatever is not text"""
    texts = [text for text in (texts if isinstance(texts, list) else [texts]) if isinstance(text, str)]
    lines = (" ".join(text.replace("\ufeff", " ").split()) for text in texts)  # U+FEFF: a byte order mark inside
    return [line.encode(errors="replace").decode() for line in lines if line]  # half of a surrogate pair becomes "?"


def parse_json(text):
    """What a JSON text holds; None if it is not JSON, as after a failed write"""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def get(row, key, kind=object):
    """row[key] if row is a dictionary and row[key] is of this kind, else an empty object of this kind"""
    value = row.get(key) if isinstance(row, dict) else None
    return value if isinstance(value, kind) else kind()


def read_table(file, text, left_out):
    """metadata.csv, metadata.jsonl or COCO's JSON, and its text -> {file name of an image: captions}"""
    captions = {}
    if file.suffix.lower() == ".csv":
        csv.field_size_limit(2**31 - 1)  # a quotation mark may be missing
        text = text.replace("\ufeff", "").strip("\r\n ")  # byte order marks; a tab may begin the header
        separator = max(",;\t", key=(text.splitlines() or [""])[0].count)
        table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        names = [name.strip().lower() for name in next(table, [])]
        # The last column with a name takes the rest of a row: captions have commas, and not all are quoted.
        last = max((i for i, name in enumerate(names) if name), default=0)
        rows = (dict(zip(names, [*row[:last], f"{separator} ".join(filter(None, row[last:]))])) for row in table)
    elif file.suffix.lower() == ".jsonl":
        rows = map(parse_json, filter(str.strip, text.split("\n")))
    else:
        coco = parse_json(text)
        names = {str(get(row, "id")): get(row, "file_name") for row in get(coco, "images", list)}
        rows = ({"file_name": names.get(str(get(row, "image_id"))), "text": get(row, "caption")}
                for row in get(coco, "annotations", list))
    for row in rows:
        name, lines = get(row, "file_name", str), tidy(get(row, "text") or get(row, "caption"))
        if name and lines:
            captions.setdefault(name.strip().replace("\\", "/"), []).extend(lines)
        else:
            left_out["rows without a file name or a caption"].append(file)
    if not captions:
        left_out["tables without a usable row"].append(file)
    return captions


LEFTOVERS = {"__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


def find_files(folder, left_out):
    """All files in a folder and its sub-folders, including links. Hidden files, leftovers of file managers and the
    folders of training runs are left out. -> [path]"""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True,
                                         onerror=lambda error: left_out["unreadable folders"].append(error.filename)):
        if os.path.realpath(place) in seen or {"config.json", "options.json"} <= {*names}:
            folders[:] = names[:] = ()  # a loop of links, or a run
        seen.add(os.path.realpath(place))
        for some in (folders, names):
            some[:] = [name for name in some if name[0] != "." and name not in LEFTOVERS]
        folders.sort(key=lambda name: os.path.islink(os.path.join(place, name)))  # folders before links to them
        found += [Path(place, name) for name in names]
    return found


def can_open(path):
    """Whether Pillow recognises an image. Reads only its beginning: the rest may still be broken."""
    try:
        if not path.is_file():  # opening a pipe would block
            return False
        with Image.open(path):
            return True
    except Exception:  # Pillow raises many kinds
        return False


def can_load(path):
    """Whether all of an image can be read."""
    try:
        load_image(path, (32, 32))
        return True
    except OSError:
        return False


def list_images(folder, coco, left_out):
    """The images in a folder that have captions. Captions come from a .txt file of the same name, one per line; from
    metadata.csv or metadata.jsonl (file_name, and text or caption); or, if `coco`, from annotations/captions_*.json.
    In a sub-folder where no image has any of these, the sub-folder's name is the caption.
    -> {path: captions}, the paths that captions_val*.json names, and a summary of the counts in words"""
    def text_of(file):
        try:
            return read_text(file)
        except OSError:
            left_out["unreadable files"].append(file)
            return ""

    def key(path):  # file systems write accents in two ways
        return unicodedata.normalize("NFC", os.path.normpath(path))
    files = find_files(folder, left_out)
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    tables = [file for file in files
              if (file.suffix == ".json" if coco else file.name.lower() in ("metadata.csv", "metadata.jsonl"))]
    others = {*files} - {*tables, *texts.values()}
    images = {file for file in tqdm(others, "images", delay=5) if can_open(file)}
    left_out["files that Pillow can't open"] += sorted(others - images)
    beside = {path: tidy(text_of(texts[path.with_suffix("")]).splitlines())
              for path in images if path.with_suffix("") in texts}
    listed, validation, by_key, by_name = {}, set(), {key(path): path for path in images}, collections.defaultdict(list)
    for path in images:
        by_name[path.name].append(path)
    for table in [table for table in tables if "captions" in table.name] or tables:
        subset = table.stem.removeprefix("captions_")  # the images of captions_val2017.json are in val2017/
        is_validation = coco and re.search("(?<![a-z])val", subset)
        for name, lines in read_table(table, text_of(table), left_out).items():
            path = by_key.get(key(table.parent / name)) or coco and by_key.get(key(folder / subset / name))
            if coco and not path:  # other folders: the image whose path ends in `name`, if it is the only one
                same = by_name[Path(name).name]
                ends = [path for path in same if key(path).endswith(key(f"/{name}"))] or same
                path = ends[0] if len(ends) == 1 else None
            if path:
                listed.setdefault(path, []).extend(lines)
                if is_validation:
                    validation.add(path)
            else:
                left_out["captions of missing images"].append(name)
    captioned = {path.parent for some in (beside, listed) for path, lines in some.items() if lines}
    named = {path: tidy(path.parent.name.replace("_", " ")) for path in images
             if not coco and path.parent not in {folder, *captioned}}
    captions = {path: lines for some in (named, listed, beside) for path, lines in some.items() if lines}
    left_out["images without captions"] += sorted(images - captions.keys())
    by_folder = f", {len(named)} of them captioned with the name of a folder" if named else ""
    return captions, validation, f"{len(images)} images, {len(captions)} with captions{by_folder}; "


def for_testing(names, validation):
    """The images kept for testing: the validation set, if at least one of its images can be read and there are others
    to train on. Otherwise the first image that can be read and about a tenth of the rest, by a hash of the name (the
    hash in `reserved` would treat a.png and b.png alike).
    names: {name: path}, sorted; validation: set of paths -> set of paths"""
    if len(validation) < len(names) and any(map(can_load, sorted(validation))):
        return validation
    first = next(filter(can_load, names.values()), None)
    digests = (hashlib.md5(name.encode(errors="surrogatepass"), usedforsecurity=False).digest() for name in names)
    testing = {first, *(path for path, digest in zip(names.values(), digests) if digest[0] < 26)}
    return testing if len(testing) < len(names) else {first}


class Images(Dataset):
    """Endless data set over a list of images, reshuffled every epoch. If an image can't be read, its name is printed,
    and the next one takes its place. items: [(path or array, captions)]"""

    def __init__(self, items, size, seed=0):
        self.items, self.size, self.seed = items, size, seed
        self.epoch, self.order, self.unreadable = None, None, set()

    def captions(self):
        """Captions to train a tokenizer on."""
        return itertools.chain.from_iterable(captions for _, captions in self.items)

    def __getitem__(self, index):
        while len(self.unreadable) < len(self.items):
            epoch, i = divmod(index, len(self.items))
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.items))
            i = self.order[i]
            file, captions = self.items[i]
            if i not in self.unreadable:
                try:
                    return np.array(load_image(file, (self.size, self.size))), "\n".join(captions)
                except OSError as error:
                    self.unreadable.add(i)
                    tqdm.write(f"skipped an image: {error}", file=sys.stderr)
            index += 1
        raise UserError(f"none of the {len(self.items)} images can be read")


def open_data(args):
    """The data set that the options name. -> {split: data set}; prints what was found and what was left out"""
    if args.data == "shapes":
        return {split: Shapes(args.image_size, args.seed, split) for split in SPLITS}
    folder, left_out, found = Path(os.path.abspath(args.data_dir)), collections.defaultdict(list), ""
    if not folder.is_dir():
        raise UserError(f"--data-dir {args.data_dir} is not a folder")
    if args.data in CIFAR:
        items = list_cifar(args.data, folder, left_out)
    else:
        captions, validation, found = list_images(folder, args.data == "coco", left_out)
        names = dict(sorted((path.relative_to(folder).as_posix(), path) for path in captions))
        testing = for_testing(names, validation)
        items = dict(train=[], test=[])
        for path in names.values():
            items["test" if path in testing else "train"].append((str(path), captions[path]))
    found += f"{len(items['train'])} to train on, {len(items['test'])} for testing"
    for reason, names in left_out.items():
        some = [*dict.fromkeys(str(name).removeprefix(f"{folder}{os.sep}") for name in names)]
        found += f"; {reason}: {len(names)} ({', '.join(some[:3])}{', ...' if len(some) > 3 else ''})" if names else ""
    if not all(items.values()):
        raise UserError(f"{args.data_dir}: too few images with captions: {found}; README.md says what is needed")
    print(f"{args.data_dir}: {found}")
    return {split: Images(items[split], args.image_size, args.seed) for split in items}


def examples(data, count, start=0):
    """-> `count` images of a data set from number `start` on (count, H, W, 3) in [0, 1]; the first caption of each"""
    images, texts = zip(*(data[i] for i in range(start, start + count)))
    return torch.from_numpy(np.stack(images)) / 255, [text.splitlines()[0] for text in texts]


# ----------------------------------------------------------------------------------------------------------------------
# Plots and the report.


def plot(curves, x_label, y_label, log=False, circles=None):
    """A PIL image of curves {label: [(x, y), ...]}, with axes, ticks and a legend; log: logarithmic y axis, y > 0;
    circles: more points under the same labels, to be drawn as circles, or None."""
    image, circles = Image.new("RGB", (640, 360), "white"), circles or {}
    pen, (left, top, right, bottom) = ImageDraw.Draw(image), (60, 24, 450, 316)
    pen.font = ImageFont.load_default(12)

    def axis(values, start, end, log):
        """-> a function from values to pixels, and the values that get a tick"""
        low, high = min(values) if log else min(0, *values), max(values)
        scale = math.log10 if log else float
        span = scale(high) - scale(low) or 1
        nice = [m * 10.0 ** e for e in range(-9, 10) for m in (1, 2, 5)]
        step = next((step for step in nice if step >= span / 6), span)
        ticks = nice if log else [i * step for i in range(math.floor(low / step), math.floor(high / step) + 1)]
        return lambda v: start + (scale(v) - scale(low)) / span * (end - start), [v for v in ticks if low <= v <= high]

    (to_x, x_ticks), (to_y, y_ticks) = (
        axis([p[i] for curve in (*curves.values(), *circles.values()) for p in curve], start, end, log and i == 1)
        for i, (start, end) in enumerate(((left, right), (bottom, top))))
    for v in x_ticks:
        pen.line([(to_x(v), top), (to_x(v), bottom)], "#dddddd")
        pen.text((to_x(v), bottom + 6), f"{v:g}", "black", anchor="ma")
    for v in y_ticks:
        pen.line([(left, to_y(v)), (right, to_y(v))], "#dddddd")
        pen.text((left - 6, to_y(v)), f"{v:g}", "black", anchor="rm")
    pen.text((right, bottom + 22), x_label, "black", anchor="ra")
    pen.text((left, 4), y_label, "black")
    colours = itertools.cycle(("#d7301f", "#2b6cb0", "#2f855a", "#b7791f", "#6b46c1", "#444444"))
    for i, ((label, curve), colour) in enumerate(zip(curves.items(), colours)):
        line, others = ([(to_x(x), to_y(y)) for x, y in some] for some in (curve, circles.get(label, ())))
        pen.line(line, colour, 2)
        for x, y in others + line * (len(line) == 1):
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], "white", colour)
        pen.line([(right + 12, top + 8 + 18 * i), (right + 28, top + 8 + 18 * i)], colour, 3)
        pen.text((right + 34, top + 8 + 18 * i), label, "black", anchor="lm")
    return image


def read_log(folder):
    """The lines of metrics.jsonl as dictionaries; a line that was cut off is left out."""
    lines = map(parse_json, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if isinstance(line, dict)]


def plot_losses(folder):
    """Plots the losses of all stages to curves.png, those of test images as circles; at most 50 points per curve, each
    the mean of several log lines."""
    losses, test_losses = {}, {}
    for line in read_log(folder):
        for curves, key in ((losses, "loss"), (test_losses, "test_loss")):
            curve = curves.setdefault(line["stage"], [])
            while curve and curve[-1][0] >= line["step"]:  # resumed or trained again: drop the old points
                curve.pop()
            if math.isfinite(line.get(key, math.nan)):
                curve.append((line["step"], max(1e-6, line[key])))
    losses, test_losses = (
        {stage: [np.mean(some, axis=0).tolist() for some in np.array_split(curve, min(50, len(curve)))]
         for stage, curve in curves.items() if curve} for curves in (losses, test_losses))
    plot(losses, "step", "loss (circles: test images)", log=True, circles=test_losses).save(folder / "curves.png")


def peak_memory(device):
    """The most memory that this process has used so far, in GB: of the GPU, or of the machine (NaN on Windows)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if os.name == "nt":
        return math.nan
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def report(run, stage, seconds, machine):
    """Adds a finished stage to report.md, a table for comparing runs."""
    last = [line for line in read_log(run.folder) if line["stage"] == stage][-1]
    path, sheet = run.folder / "report.md", f"sheets/{stage}_{last['step']:06d}.png"
    row = (stage, f"{seconds / 60:.1f}", last["step"], run.recipe(stage).batch, f"{last['images_per_s']:.0f}",
           f"{peak_memory(run.device.type):.1f}", f"{last['loss']:.4f}", f"{last.get('test_loss', math.nan):.4f}",
           f"[sheet]({sheet})" if (run.folder / sheet).exists() else "")
    text = read_text(path) if path.exists() else (
        f"# {run.folder.name}\n\n{machine}; Python {platform.python_version()}, {platform.platform()}. Preset "
        f"{run.args.preset}, data {run.args.data}, {run.model.config.image_size} px.\n\n"
        f"`python tests/score.py --run {run.folder}` adds its scores.\n\n![losses](curves.png)\n")
    if not text.endswith("|\n"):  # start a new table, also after a table of scores
        text += ("\n| stage | minutes (since the last resume) | steps | batch | images/s | peak memory so far, GB "
                 "| loss | test loss | test images |\n" + "| --- " * len(row) + "|\n")
    save_atomically(path, text + "| " + " | ".join(map(str, row)) + " |\n")


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

FIXED = ("preset", "data", "image_size", "init_from", "tokens")  # options that a run keeps from its first command on
SAVED = (*FIXED, "data_dir", "flip", "seed", "device", "precision", "freeze_text", "cache")  # reused by later commands


def read_options(folder):
    """The options of a run's last command, {} if there is no such run."""
    path = Path(folder) / "options.json"
    return read_json(path) if path.exists() else {}


def pick_precision(device):
    """bfloat16 on a CPU or CUDA GPU that has it; otherwise, float16 on CUDA and float32 on CPU and MPS."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    has = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch can't tell
    there = device == "cpu" and any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if there else "float32"


def plain_attention(device, precision):
    """Whether training computes attention as softmax(q·kᵀ/√d)·v, product by product, instead of by PyTorch's fused
    kernel. On a CPU, the backward pass of the fused one takes up to twice as long in bfloat16; in float32, the two are
    equally fast."""
    return device == "cpu" and precision == "bfloat16"


@contextlib.contextmanager
def computing(device, precision, plain):
    """In this context, matrix products have the given precision, and attention is plain or PyTorch's own choice."""
    half = precision != "float32"  # for float32, no dtype: on MPS, some PyTorch versions warn about it even if disabled
    with (torch.autocast(device, getattr(torch, precision) if half else None, enabled=half),
          sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()):
        yield


def parse_args(argv=None):
    """Each option takes the value given in the command; if none is given, the value saved in the run; otherwise, one
    that suits the data set."""
    parser = argparse.ArgumentParser(description="Train Würstchen: tokenizer, text encoder, Stages A, B and C. A run "
                                     "remembers " + ", ".join(SAVED) + ". From its first checkpoint on, an unfinished "
                                     "stage also remembers its steps, batch size and learning rate, but later stages "
                                     "do not inherit them. Give all other options again with each command.")
    add, positive = parser.add_argument, number(int, 1, 10**9)
    add("stage", nargs="?", default="all", choices=("all", *TRAIN), help="all: every unfinished stage")
    add("--run", default="runs/tiny", help="folder of the run (default: %(default)s)")
    add("--preset", choices=PRESETS, help="sizes of the networks, and the recipe; if not given, "
        "tiny for Shapes, cifar for CIFAR, else photos")
    add("--init-from", metavar="RUN", help="start from the weights of another run, or from a folder with the published "
        "snapshots; name the stage to train")
    add("--data", default="shapes", choices=("shapes", *CIFAR, "coco", "folder"), help="default: %(default)s")
    add("--data-dir", help="folder of the data set; Shapes needs none")
    add("--download", action="store_true", help="fetch the data set into --data-dir first, if it is not there: CIFAR, "
        "or COCO's val2017 (2.7 GB with its archives)")
    add("--image-size", type=number(int, 32, 8192), help="side of the images in pixels, the preset's if not given")
    add("--tokens", action="store_true", help="Stage B as in the paper's first version: it predicts Stage A's codes")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror images at random, except those whose "
        "captions say left or right (default: yes, except for Shapes)")
    add("--steps", type=positive, help="steps per stage (default: an unfinished stage's own, else the preset's)")
    add("--batch-size", type=number(int, 2, 10**6), help="images per step (default: as for --steps)")
    add("--lr", type=number(float, 1e-12, 10), help="peak learning rate (default: as for --steps)")
    add("--cache", type=positive, help="train Stages B and C on this many images, whose latents are computed once "
        "(default: all; for Shapes, 16,384)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="random seed (default: %(default)s)")
    add("--device", choices=DEVICES, help="default: auto, the best available")
    add("--freeze-text", action=argparse.BooleanOptionalAction, default=False,
        help="don't train Stage C's text encoder")
    add("--precision", choices=("float32", "bfloat16", "float16"), help="precision of matrix products; default: "
        "bfloat16 if the CPU or CUDA GPU has it, else float16 on CUDA and float32 elsewhere")
    add("--compile", action="store_true", help="torch.compile for Stages B and C")
    add("--workers", type=number(int, 0, 256), default=0, help="processes that prepare images (default: 0: the main "
        "process does it)")
    add("--log-every", type=positive, default=10, help="steps between lines in metrics.jsonl (default: %(default)s)")
    add("--save-every", type=positive, default=250, help="steps between checkpoints and sheets (default: %(default)s)")
    args = parser.parse_args(argv)  # parsed twice: what is saved in --run takes the place of the defaults
    saved = read_options(args.run)
    if args.init_from and not saved:  # sizes are those of the weights
        source = {"preset": "v2", "image_size": PRESETS["v2"].image_size} | read_options(args.init_from)
        parser.set_defaults(**{name: source[name] for name in ("preset", "image_size", "data", "data_dir")
                               if name in source})
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    args.preset = args.preset or ("tiny" if args.data == "shapes" else "cifar" if args.data in CIFAR else "photos")
    args.flip = args.data != "shapes" if args.flip is None else args.flip
    args.cache = args.cache or (16_384 if args.data == "shapes" else None)
    args.image_size = args.image_size or PRESETS[args.preset].image_size
    begun = {"init_from": None, "tokens": False} | saved  # older runs lack some options
    for name in FIXED if saved else ():
        if getattr(args, name) != begun.get(name, getattr(args, name)):
            parser.error(f"{args.run} was started with {name} {begun[name]}; use another --run")
    if bool(args.data_dir) == (args.data == "shapes"):
        parser.error(f"--data {args.data} " + ("takes no --data-dir; give --data too" if args.data_dir else
                                            "needs a --data-dir"))
    if args.init_from and not saved and not Path(args.init_from).is_dir():
        parser.error(f"--init-from {args.init_from}: there is no such folder")
    if args.init_from and args.tokens:
        parser.error("--init-from takes the sizes of its weights: --tokens can't change them")
    if args.image_size % PRESETS[args.preset].stride:
        parser.error(f"--image-size must be a multiple of {PRESETS[args.preset].stride}")
    if args.download and args.data not in DOWNLOADS:
        parser.error(f"--download needs --data {' or '.join(DOWNLOADS)}")
    if args.compile and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        parser.error("--compile needs a C++ compiler")
    if args.init_from and args.stage not in TRAIN:
        parser.error(f"a run with --init-from needs the stage to train: {', '.join(TRAIN)}")
    return args


def begin(args, captions):
    """Writes what all commands of a run need: sizes and vocabulary; with --init-from, weights too."""
    if Path(args.run).is_dir() and any(Path(args.run).iterdir()):
        raise UserError(f"{Path(args.run)} is not empty, and is not a run (it has no options.json): use another --run")
    if args.init_from:
        own = read_options(args.init_from)
        model = Wuerstchen.load(args.init_from) if own else Wuerstchen.from_official(args.init_from)
        if model.compressor is None and args.stage != "a":
            raise UserError(f"{args.init_from} has no EfficientNetEncoder, which stage {args.stage} needs")
        model.config.image_size, tokenizer = args.image_size, model.tokenizer
        model.save(args.run)
        if (clip := Path(args.init_from) / "clip.pt").exists():
            shutil.copy(clip, args.run)
    else:
        config = copy.deepcopy(PRESETS[args.preset])
        config.image_size = args.image_size
        if args.tokens:
            config.b.token_width, config.b.sees_semantic = config.b.channels[0], (False,) * len(config.b.channels)
        tokenizer = train_tokenizer(captions, config)
        config.text_c.vocab_size, config.text_c.length = len(tokenizer), tokenizer.length
        config.text_b = config.text_c  # one text encoder's sizes for both stages
        with torch.device("meta"):  # no weights yet: only the sizes and the tokenizer are saved
            Wuerstchen(config, tokenizer).save(args.run, stages=())
    counts = collections.Counter(captions)
    longer = sum(n for caption, n in counts.items() if tokenizer.overflow(caption)) / len(captions)
    cut = f"; {longer:.1%} of the captions are longer than that, and are cut" if longer else ""
    print(f"tokenizer: a vocabulary of {len(tokenizer)} tokens, captions of up to {tokenizer.length} tokens{cut}")


def main(argv=None):
    args = parse_args(argv)
    saved, device = read_options(args.run), pick_device(args.device)
    precision = args.precision or pick_precision(device)
    machine = print_machine(device, precision + ", plain attention" * plain_attention(device, precision))
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs for what autocast leaves in float32
    start = time.time()
    if args.download:
        download(args.data, Path(args.data_dir))
    data = open_data(args)
    if not saved:
        begin(args, list(data["train"].captions()))
    options = {name: getattr(args, name) for name in SAVED}
    if options != saved:  # `cached` compares dates with this file: write it only if it changed
        save_atomically(Path(args.run) / "options.json", json.dumps(options, indent=1) + "\n")
    run = Run(args, data)
    for stage in TRAIN if args.stage == "all" else [args.stage]:
        path = run.folder / f"{stage}.pt"
        if args.stage == "all" and path.exists():
            print(f"stage {stage}: already trained")
            continue
        begun = time.time()
        torch.manual_seed(args.seed)  # a stage gives the same result alone or as part of `all`
        run.pretrained = bool(args.init_from) and path.exists()
        # All weights are new, except those of the stages that this one builds on and, after --init-from, its own.
        run.model = Wuerstchen.load(run.folder, NEEDS[stage] + (stage,) * run.pretrained).to(run.device)
        unfinished = run.folder / f"{stage}.ckpt"
        for needed in (run.folder / f"{name}.pt" for name in NEEDS[stage]):
            if unfinished.exists() and needed.stat().st_mtime > unfinished.stat().st_mtime:
                raise UserError(f"{unfinished} is older than {needed}: delete it to begin stage {stage} again")
        TRAIN[stage](run)
        run.model.save_stage(run.folder, stage)
        shutil.rmtree(run.folder / "cache", ignore_errors=True)
        plot_losses(run.folder)
        report(run, stage, time.time() - begun, machine)
        unfinished.unlink(missing_ok=True)  # after the report, which reads the recipe in it
    print(f"{run.folder}: done in {time.time() - start:.0f} s")
    if (run.folder / "c.pt").exists():
        print(f'generate with it: python sample.py "..." --run {run.folder}')


if __name__ == "__main__":
    run_script(main, "stopped; run the same command again to resume from the last checkpoint, if there is one")
