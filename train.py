"""
Trains Würstchen from nothing, stage by stage:

    python train.py                                      everything: Shapes, 128 px; under 15 minutes on two CPU cores
    python train.py --data cifar10 --data-dir DIR --image-size 64 --run runs/cifar
    python train.py c --steps 5000                       one stage again, longer

The order is the paper's: tokenizer, text encoder (contrastively), Stage A, Stage B with its semantic compressor,
Stage C on the compressor's latents. Stage B reads the text encoder as it is; Stage C goes on training its own copy.
Not the authors', but what lets it learn in minutes: captions' wrong twins in the contrastive training, the optimizer
Muon, and a cosine for the learning rate.
What a run leaves in its folder:

    config.json, tokenizer/     sizes and vocabulary
    options.json                what the run was begun with
    text.pt a.pt b.pt c.pt      finished stages, as `Wuerstchen.load` reads them: the averaged (EMA) weights
    clip.pt                     the contrastive model whole, by which `sample.py --score` judges
    STAGE.ckpt                  an unfinished stage, to go on from
    semantic.pt                 what Stage C learns from
    metrics.jsonl               a line every few steps: loss, pictures a second, and what a stage measures at its end
    sheets/                     pictures of how far it is

Read it from top to bottom: the data sets, sheets of pictures, the training loop that all stages share, the stages.
"""

import argparse
import copy
import json
import math
import os
import re
import shlex
import signal
import sys
import tarfile
import textwrap
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from tokenizer import Tokenizer
from wuerstchen import (CLIP, PRESETS, Discriminator, Wuerstchen, add_noise, codebook_usage, contrastive_loss,
                        diffusion_loss, resize, save_config, save_whole, shrink, training_times)

# ----------------------------------------------------------------------------------------------------------------------
# Data sets. Each is endless: data[i] for any i >= 0 is (picture, uint8 array (size, size, 3); caption), the same for
# the same seed. First Shapes, drawn on the fly: "a big blue square to the left of a small green star".

COLOURS = {"red": (215, 35, 35), "orange": (250, 135, 20), "yellow": (250, 225, 40), "green": (40, 160, 60),
           "cyan": (40, 210, 225), "blue": (40, 75, 220), "purple": (130, 40, 170), "pink": (250, 130, 190)}
BACKGROUNDS = {"white": (243, 243, 243), "grey": (150, 150, 150), "dark": (35, 35, 38)}
# Radius range as a share of the picture's side: 16-18 and 24-26 pixels of 128.
SIZES = {"small": (0.125, 0.14), "big": (0.185, 0.2)}
# Unit step from the second object to the first (x to the right, y down).
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# One pair per shape, five different colours: what a model must put together without having seen it.
HELD_OUT = {("purple", "circle"), ("yellow", "square"), ("cyan", "triangle"), ("red", "star"), ("green", "cross")}
SPLITS = ("train", "test", "heldout")
JITTER = 0.015  # how far an object lies from its place at most, as a share of the side; alone, twice as far
TINT = {"object": 10, "background": 3}  # largest change of a colour channel, of 255


def ring(n, radius, start=-90):
    """n points on a circle, the first one straight up: (n, 2) array of x, y."""
    angle = np.radians(start + 360 / n * np.arange(n))
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


# Outlines for radius 1. A square fills its box and a star does not, so the
# reach differs a little from shape to shape for them to look equally big.
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
            names.append(("an " if words[0] == "o" else "a ") + words)  # "orange" is the only vowel
        text = f" {self.relation} ".join(names)
        return text + (f" on a {self.background} background" if self.background else "")


THING = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(OUTLINES)})"
GRAMMAR = re.compile(rf"{THING}(?: ({'|'.join(RELATIONS)}) {THING})?(?: on a ({'|'.join(BACKGROUNDS)}) background)?")


def parse(caption):
    """The Scene a caption names. Raises ValueError for a sentence that Shapes cannot say."""
    found = GRAMMAR.fullmatch(caption)
    if not found:
        raise ValueError(f"not a Shapes caption: {caption!r}")
    *first, relation, size, colour, shape, background = found.groups()
    scene = Scene([tuple(first)] + ([(size, colour, shape)] if relation else []), relation, background)
    if scene.caption() != caption:  # "a orange circle"
        raise ValueError(f"not a Shapes caption: {caption!r}; did you mean {scene.caption()!r}?")
    if relation and first[1:] == [colour, shape]:
        raise ValueError(f"two objects of the same colour and shape: {caption!r}")
    return scene


def random_scene(rng):
    """40 % one object, 60 % two; size and background are named in some captions only."""
    def pick(names):
        return list(names)[rng.integers(len(names))]

    def thing():
        return pick(SIZES) if rng.random() < 0.75 else None, pick(COLOURS), pick(OUTLINES)

    background = pick(BACKGROUNDS) if rng.random() < 0.3 else None
    first = thing()
    if rng.random() < 0.4:
        return Scene([first], None, background)
    second = thing()
    while second[1:] == first[1:]:
        second = thing()
    return Scene([first, second], pick(RELATIONS), background)


def split_of(scene):
    """The one split a scene's caption belongs to."""
    if any((colour, shape) in HELD_OUT for _, colour, shape in scene.objects):
        return "heldout"
    # A hash of the caption reserves one in sixteen for testing, whatever the seed.
    return "test" if zlib.crc32(scene.caption().encode()) % 16 == 0 else "train"


def place(scene, rng):
    """Centres (x, y) of the objects as shares of the side: one in the middle; two in the middles of two halves, so that
    even big ones don't touch; all a little off."""
    step = np.array(RELATIONS.get(scene.relation, (0, 0)))
    steps = [step, -step] if scene.relation else [step]
    return [0.5 + 0.25 * step + rng.uniform(-JITTER, JITTER, size=2) * 2 / len(steps) for step in steps]


def draw(caption, rng, size=128):
    """A picture of the caption: uint8 array (size, size, 3). Sizes and places it leaves open are drawn at random."""
    scene = parse(caption)

    def tinted(rgb, most):
        return tuple(int(v) for v in np.clip(np.add(rgb, rng.integers(-most, most + 1, size=3)), 0, 255))

    background = scene.background or "white"
    picture = Image.new("RGB", (size, size), tinted(BACKGROUNDS[background], TINT["background"]))
    radii = [rng.uniform(*SIZES[name or ("small", "big")[rng.integers(2)]]) for name, _, _ in scene.objects]
    for (_, colour, shape), radius, (x, y) in zip(scene.objects, radii, place(scene, rng)):
        # Smooth edges: draw only the object's own box, four times as large, and reduce it.
        r = radius * REACH[shape]
        left, top, side = int((x - r) * size), int((y - r) * size), int(2 * r * size) + 3
        outline = (np.array([x, y]) + radius * OUTLINES[shape]) * size - (left, top)
        mask = Image.new("L", (4 * side, 4 * side))
        ImageDraw.Draw(mask).polygon((4 * outline - 0.5).ravel().tolist(), fill=255)
        picture.paste(tinted(COLOURS[colour], TINT["object"]), (left, top, left + side, top + side), mask.reduce(4))
    return np.array(picture)


class Shapes:
    """data[i] -> (uint8 array (size, size, 3), caption), for every i >= 0; the same for the same seed.

    split: "train"; "test", captions never trained on; "heldout", captions with a pair of HELD_OUT.
    """

    def __init__(self, size=128, seed=0, split="train"):
        if split not in SPLITS:
            raise ValueError(f"split is one of {SPLITS}, not {split!r}")
        self.size, self.seed, self.split = size, seed, split

    def start(self, index):
        """The caption of a picture, and the random numbers left to draw it with."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        while split_of(scene := random_scene(rng)) != self.split:
            pass
        return scene.caption(), rng

    def caption(self, index):
        return self.start(index)[0]

    def __getitem__(self, index):
        caption, rng = self.start(index)
        return draw(caption, rng, self.size), caption

    def confuse(self, caption, rng):
        """A caption of the same words that is wrong: two objects exchange places, or sizes, colours or shapes. None for
        one object, and where it would be another split's, kept from training."""
        scene = parse(caption)
        if not scene.relation:
            return None
        first, second = scene.objects
        ways = [part for part in range(3) if None not in (first[part], second[part]) and first[part] != second[part]]
        part = rng.choice([*ways, 3])  # 3: all at once
        first, second = zip(*((b, a) if part in (i, 3) else (a, b) for i, (a, b) in enumerate(zip(first, second))))
        wrong = Scene([first, second], scene.relation, scene.background)
        return wrong.caption() if split_of(wrong) in ("train", self.split) else None


CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "a small photo of a {}")


class Cifar10:
    """CIFAR-10's binary version: a folder that holds cifar-10-batches-bin/, or that folder, or its .tar.gz. A record is
    the label and 32x32 red, green and blue values, 3,073 bytes. FileNotFoundError or ValueError says what is wrong."""

    def __init__(self, folder, size=32, seed=0, split="train"):
        names = re.compile(r"data_batch_\d\.bin" if split == "train" else r"test_batch\.bin")
        path = Path(folder)
        if not path.exists():
            raise FileNotFoundError(f"no such data folder: {path}")
        archive = path if path.is_file() else next(iter(sorted(path.glob("cifar-10*.tar.gz"))), None)
        found = sorted(p for p in [*path.glob("*.bin"), *path.glob("cifar-10-batches-bin/*.bin")]
                       if names.fullmatch(p.name))
        if found:
            parts = {p: p.read_bytes() for p in found}
        elif archive:
            try:
                with tarfile.open(archive) as tar:
                    parts = {m.name: tar.extractfile(m).read() for m in tar if names.fullmatch(Path(m.name).name)}
            except (tarfile.TarError, EOFError, OSError, zlib.error):
                raise ValueError(f"{archive} is not CIFAR-10's .tar.gz, or is damaged") from None
        else:
            parts = {}
        if not parts:
            raise FileNotFoundError(f"no CIFAR-10 binary version (cifar-10-batches-bin/, {names.pattern}) in {path}")
        for name, part in parts.items():
            if not part or len(part) % 3073:
                raise ValueError(f"{name} is not CIFAR-10: {len(part)} bytes are no multiple of 3073")
        records = np.concatenate([np.frombuffer(part, np.uint8).reshape(-1, 3073) for part in parts.values()])
        if records[:, 0].max() > 9:
            raise ValueError(f"{path} is not CIFAR-10: a label is {records[:, 0].max()}, not 0 to 9")
        self.labels, self.pixels = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        self.size, self.seed = size, seed

    def start(self, index):
        """Which record, and the random numbers left. Every epoch goes through the records in a new order."""
        epoch, i = divmod(index, len(self.labels))
        if getattr(self, "epoch", None) != epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.labels))
        return self.order[i], np.random.default_rng((self.seed, 1, index))

    def caption(self, index):
        record, rng = self.start(index)
        name = CIFAR_CLASSES[self.labels[record]]
        text = CIFAR_TEMPLATES[rng.integers(len(CIFAR_TEMPLATES))].format(name)
        return text.replace("a airplane", "an airplane").replace("a automobile", "an automobile")

    def __getitem__(self, index):
        record, _ = self.start(index)
        picture = Image.fromarray(self.pixels[record]).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.array(picture), self.caption(index)

    def confuse(self, caption, rng):
        """One object: there is nothing to exchange."""
        return None


def open_data(args, split="train"):
    if args.data == "shapes":
        return Shapes(args.image_size, args.seed, split)
    if args.data_dir is None:
        raise ValueError(f"--data {args.data} needs --data-dir")
    return Cifar10(args.data_dir, args.image_size, args.seed, split)


def collate(items):
    """Pictures and captions -> images (B, H, W, 3) uint8, list of B captions"""
    pictures, captions = zip(*items)
    return torch.from_numpy(np.stack(pictures)), list(captions)


# ----------------------------------------------------------------------------------------------------------------------
# Sheets of pictures.


def to_picture(image):
    """(H, W, 3) in [0, 1] -> PIL image"""
    return Image.fromarray((image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy())


def make_sheet(rows, captions=None, gap=4):
    """A PIL image of rows of pictures; captions go under the last row.

    rows: list of (N, H, W, 3) tensors in [0, 1]; captions: N strings"""
    count, height, width, _ = rows[0].shape
    lines = [textwrap.wrap(caption, width // 6) for caption in captions] if captions else []
    text_height = 11 * max(map(len, lines), default=0)
    sheet = Image.new("RGB", (count * (width + gap) + gap, len(rows) * (height + gap) + gap + text_height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(to_picture(image), (gap + x * (width + gap), gap + y * (height + gap)))
    pen = ImageDraw.Draw(sheet)
    for x, caption in enumerate(lines):
        for y, line in enumerate(caption):
            pen.text((gap + x * (width + gap), len(rows) * (height + gap) + gap + 11 * y), line, "black")
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# The training loop that all stages share.


@dataclass
class Recipe:
    steps: int
    batch: int
    lr: float


RECIPES = {
    "tiny": dict(text=Recipe(500, 64, 5e-4), a=Recipe(400, 32, 4e-3), b=Recipe(2000, 32, 1.2e-3),
                 c=Recipe(500, 128, 1.5e-3)),
    "small": dict(text=Recipe(20_000, 256, 5e-4), a=Recipe(40_000, 32, 3e-4), b=Recipe(100_000, 64, 2e-4),
                  c=Recipe(100_000, 256, 2e-4)),
    "v2": dict(text=Recipe(200_000, 1024, 1e-4), a=Recipe(200_000, 64, 1e-4), b=Recipe(300_000, 384, 1e-4),
               c=Recipe(900_000, 1280, 1e-4)),
}
# Pictures that stages B and C learn from, where --cache doesn't say: about as many as fit a usual memory.
CACHE = {"tiny": 16_384, "small": 50_000, "v2": 8192}


class Run:
    """What every stage needs: the options, the model so far, the data, the log."""

    def __init__(self, args, model):
        self.args, self.model, self.config, self.device = args, model, model.config, args.device
        self.folder = Path(args.run)
        self.train_data, self.test_data = open_data(args, "train"), open_data(args, "test")

    def recipe(self, stage):
        recipe = RECIPES[self.args.preset][stage]
        return Recipe(self.args.steps or recipe.steps, self.args.batch_size or recipe.batch, self.args.lr or recipe.lr)

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.args.precision == "bfloat16")

    def log(self, **numbers):
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in numbers.items()}) + "\n")

    def batches(self, data, batch, first, steps):
        """Batches number `first` to `steps` - 1 of a data set: images (B, H, W, 3) in [0, 1], B captions"""
        loader = DataLoader(data, batch, sampler=range(first * batch, steps * batch), collate_fn=collate,
                            num_workers=self.args.workers, generator=torch.Generator())  # not from the global one
        for images, captions in loader:
            yield images.to(self.device) / 255, captions

    def train_batches(self, first, recipe):
        return self.batches(self.train_data, recipe.batch, first, recipe.steps)

    def cached(self, what):
        """The first --cache pictures (in whole batches of 64), for what is computed of them once."""
        steps = -(-self.args.cache // 64)
        return tqdm(self.batches(self.train_data, 64, 0, steps), desc=what, total=steps)

    def picks(self, *tensors):
        """A function that gives `fit` batches of what was computed once: rows of each tensor (N, ...)."""
        def batches(first, recipe):
            for step in range(first, recipe.steps):
                rows = np.random.default_rng((self.args.seed, step)).integers(len(tensors[0]), size=recipe.batch)
                yield [x[rows].to(self.device) for x in tensors]
        return batches

    def examples(self, count=8):
        """The same few test pictures for every sheet."""
        return next(self.batches(self.test_data, count, 0, 1))

    def tokens(self, captions):
        """ids and mask (B, L)"""
        return [x.to(self.device) for x in self.model.tokenizer(captions)]

    def save_sheet(self, stage, step, rows, captions):
        folder = self.folder / "sheets"
        folder.mkdir(exist_ok=True)
        make_sheet(rows, captions).save(folder / f"{stage}_{step:06d}.png")


def update_average(average, network, step):
    """Exponential moving average of the weights, over about the last tenth of the run so far (at most 1,000 steps:
    the authors' 0.9 every 100 steps). BatchNorm's statistics are copied."""
    decay = min(0.999, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        for old, new in zip(average.buffers(), network.buffers()):
            old.copy_(new)


def random_state():
    """Of all generators that training draws from. Data comes by index and needs none."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(states):
    torch.set_rng_state(states[0].cpu())
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states[1:]])


def make_optimizers(network, pace, muon):
    """AdamW, as the authors have it. With `muon`, large matrices learn by Muon instead (Jordan et al., 2024), which
    makes all directions of an update equally long: stages B and C then need far fewer pictures. pace(name): what a
    parameter's learning rate is multiplied by."""
    large = {m.weight for m in network.modules() if muon and isinstance(m, nn.Linear) and min(m.weight.shape) >= 64}
    groups = {}
    for name, p in network.named_parameters():
        groups.setdefault((p in large, pace(name)), []).append(p)

    def of(kind, factor):
        return [dict(params=params, pace=factor * x) for (is_large, x), params in groups.items() if is_large == kind]

    optimizers = [torch.optim.AdamW(of(False, 1), betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    if large:  # its steps are scaled to be as long as AdamW's, and can be three times longer
        optimizers.append(torch.optim.Muon(of(True, 3), weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def fit(run, stage, network, batches, loss_of, show, pace=lambda name: 1, muon=True):
    """Trains `network` and returns its moving average.

    batches(first, recipe) yields batches from step `first` on; loss_of(network, batch, step) gives the loss and a dict
    of numbers to log; show(average, step) saves a sheet, or measures; pace and muon as in `make_optimizers`. Ctrl-C
    saves a checkpoint, as do every --save-every steps, and the next call goes on from it."""
    recipe, path = run.recipe(stage), run.folder / f"{stage}.ckpt"
    average = copy.deepcopy(network).eval().requires_grad_(False)
    network.train()
    optimizers = make_optimizers(network, pace, muon)
    step, warm_up = 0, min(10_000, recipe.steps // 20 + 1)
    if path.exists():
        state = torch.load(path, map_location=run.device, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        step = state["step"]
        set_random_state(state["random"])
        print(f"stage {stage}: going on from step {step}")

    def save():
        save_whole(path, dict(network=network.state_dict(), average=average.state_dict(), step=step,
                              optimizers=[optimizer.state_dict() for optimizer in optimizers], random=random_state()))

    stop = []  # Ctrl-C or a polite kill: the step under way ends first
    before = {number: signal.signal(number, lambda number, _: stop.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    start, first = time.time(), step
    bar = tqdm(total=recipe.steps, initial=step, desc=f"stage {stage}" if len(stage) == 1 else stage, unit="step")
    for batch in batches(step, recipe):
        # Linear warm-up as the authors do; then a cosine down to 0, which a run of minutes needs more than theirs did.
        rate = min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate * group["pace"]
        with run.autocast():
            loss, numbers = loss_of(network, batch, step)
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
        update_average(average, network, step)
        step += 1
        bar.update()
        if step % run.args.log_every == 0 or step == recipe.steps:
            speed = (step - first) * recipe.batch / (time.time() - start)
            bar.set_postfix_str(f"loss {loss.item():.4f}, {speed:.0f} images/s")
            run.log(stage=stage, step=step, loss=loss.item(), images_per_s=speed, seconds=time.time() - start,
                    **{k: v.item() if torch.is_tensor(v) else v for k, v in numbers.items()})
        if step % run.args.sheet_every == 0 or step == recipe.steps:
            show(average, step)
        if step % run.args.save_every == 0 or stop:
            save()
        if stop:
            bar.close()
            print(f"stopped in stage {stage} after step {step} of {recipe.steps}; to go on from there: "
                  f"{shlex.join(['python', *sys.argv])}", file=sys.stderr)
            sys.exit(128 + stop[0])
    bar.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    return average


# ----------------------------------------------------------------------------------------------------------------------
# The stages.


def train_tokenizer(args, config, captions=20_000):
    """Byte-pair merges learned on the training captions, until the vocabulary is full or no pair comes twice."""
    data = open_data(args, "train")
    room = config.text.vocab_size - 514  # bytes, bytes that end a word, start and end token
    tokenizer = Tokenizer.train((data.caption(i) for i in range(captions)), room, config.text.length)
    config.text.vocab_size = len(tokenizer)
    print(f"tokenizer: {len(tokenizer)} tokens")
    return tokenizer


def train_text(run):
    """The text encoder, contrastively against an EfficientNet. (The authors take OpenCLIP's, trained just so.)

    Among random captions a list of the words suffices to find the right one, so nothing would be learned of which word
    belongs to which (Yuksekgonul et al., 2023). Hence each caption's wrong twin joins them, the same words exchanged.
    """
    seed, side = run.args.seed, max(32, run.args.image_size // 2)  # small pictures will do

    def compare(clip, images, captions, data, rng):
        """-> logits (B, N) and ids (N, L) of the captions, then of the twins; the rows of pictures that have one"""
        twins = [data.confuse(caption, rng) for caption in captions]
        ids, mask = run.tokens(captions + [twin for twin in twins if twin])
        return clip(resize(images, side, side), ids, mask), ids, [i for i, twin in enumerate(twins) if twin]

    def loss_of(clip, batch, step):
        logits, ids, _ = compare(clip, *batch, run.train_data, np.random.default_rng((seed, step)))
        return contrastive_loss(logits, ids), {}

    @torch.no_grad()
    def measure(clip, step):
        """Of 256 test pictures: for what share their own caption fits best, and for what share better than its twin."""
        logits, ids, rows = compare(clip, *run.examples(256), run.test_data, np.random.default_rng(seed))
        best = logits[:, :256].argmax(dim=1)
        numbers = dict(accuracy=(ids[best] == ids[:256]).all(dim=1).float().mean().item())
        if rows:
            better = logits[rows, rows] > logits[rows, range(256, len(ids))]
            numbers["twins_told_apart"] = better.float().mean().item()
        run.log(stage="text", step=step, **numbers)

    clip = fit(run, "text", CLIP(run.config).to(run.device), run.train_batches, loss_of, measure)
    save_whole(run.folder / "clip.pt", clip.state_dict())  # whole, for `sample.py --score`
    run.model.text_b = clip.text
    run.model.compressor.backbone = clip.image  # where Stage B's compressor starts


def train_a(run):
    """The VQGAN. It learns from pieces with half the picture's side, as nothing in it looks far: twice as many pictures
    in half the time. Its discriminator joins when half of the run is over and there is something to refine."""
    cfg, steps, side = run.config.a, run.recipe("a").steps, max(32, run.args.image_size // 2)
    depth = min(cfg.disc_depth, side.bit_length() - 2)  # leaves at least 2x2 patches, which InstanceNorm needs
    network = nn.ModuleDict(dict(a=run.model.a, discriminator=Discriminator(depth, cfg.disc_width)))
    network.register_buffer("idle", torch.full((cfg.codebook_size,), math.inf))  # in the checkpoint, not in a.pt

    def loss_of(network, batch, step):
        vqgan, discriminator = network["a"], network["discriminator"]
        images = crop(batch[0], side)
        reconstruction, latents, codes, vq_loss = vqgan(images)
        revived = vqgan.quantizer.revive(latents, codes, network.idle, patience=50)
        mse = F.mse_loss(reconstruction, images)
        loss = mse + F.l1_loss(reconstruction, images) + vq_loss
        numbers = dict(mse=mse, vq_loss=vq_loss, revived=revived)
        if step >= steps // 2:
            # Hinge losses. One optimizer serves both: the generator's term must not reach the discriminator's weights,
            # nor the discriminator's the generator.
            discriminator.requires_grad_(False)
            fool = -discriminator(reconstruction).mean()
            discriminator.requires_grad_(True)
            real, fake = discriminator(images), discriminator(reconstruction.detach())
            tell = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            loss = loss + 0.005 * fool + tell
            numbers.update(fool=fool, tell=tell)
        return loss, numbers

    def sheet(network, step):
        images, captions = run.examples()
        run.save_sheet("a", step, [images, network["a"](images)[0]], captions)

    # A code only has a gradient when it is chosen, and must keep up with latents that move: it learns faster.
    average = fit(run, "a", network.to(run.device), run.train_batches, loss_of, sheet,
                  pace=lambda name: 5 if name.endswith("codebook") else 1, muon=False)
    run.model.a = average["a"]
    measure_a(run)


def crop(images, side):
    """A piece of each picture, one place for all, on Stage A's grid. (B, H, W, 3) -> (B, side, side, 3)"""
    top, left = (4 * int(torch.randint((n - side) // 4 + 1, ())) for n in images.shape[1:3])
    return images[:, top:top + side, left:left + side]


@torch.no_grad()
def measure_a(run):
    """Over a validation pass: PSNR (dB) with and without the quantizer, use of the codebook, and the deviation of the
    latents, by which Stage B's are divided."""
    errors, codes, deviation = [], [], []
    for images, _ in run.batches(run.test_data, 32, 0, 8):
        reconstruction, latents, batch_codes, _ = run.model.a(images)
        unquantized = run.model.a.decode(latents)
        errors.append(torch.stack([(x.clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
                                   for x in (reconstruction, unquantized)]))
        codes.append(batch_codes)
        deviation.append(latents.std())
    psnr, psnr_unquantized = (-10 * torch.cat(errors, dim=1).log10()).mean(dim=1).tolist()
    usage, perplexity = codebook_usage(torch.cat(codes), run.config.a.codebook_size)
    # 2.5 times the deviation, and large flat shapes hide in the noise long enough for B to ask the semantic latents
    # where they are.
    run.model.a.scale.fill_(2.5 * torch.stack(deviation).mean())
    run.log(stage="a", psnr=psnr, psnr_unquantized=psnr_unquantized, codebook_usage=usage, perplexity=perplexity)
    print(f"stage A: PSNR {psnr:.1f} dB ({psnr_unquantized:.1f} without the quantizer), "
          f"{usage:.0%} of the codebook in use, perplexity {perplexity:.0f}")


def train_b(run):
    """Stage B, and the semantic compressor with it: what the compressor keeps is what helps B to draw."""
    model = run.model
    tensors, nothing = frozen_latents(run)
    network = nn.ModuleDict(dict(compressor=model.compressor, b=model.b))

    def loss_of(network, batch, step):
        small, latents, text = batch
        text = torch.where(chance(0.05, text), nothing, text).float()  # learns to do without a caption
        semantic = network["compressor"](small / 255).float()
        # B must draw from what C will give it, which is never quite right, and must know what "nothing" looks like:
        # 5 % of the semantic latents are zeroed, 30 % of the others noised.
        n = len(small)
        noised = add_noise(semantic, torch.randn_like(semantic), torch.rand(n, device=run.device) / 2)
        semantic = torch.where(chance(0.3, semantic), noised, semantic)
        semantic = torch.where(chance(0.05, semantic), 0, semantic)
        latents = latents.float() / model.a.scale
        t, noise = training_times(n, run.device), torch.randn_like(latents)
        predicted = network["b"](add_noise(latents, noise, t), t, semantic, text)
        return diffusion_loss(noise, predicted, t), {}

    def sheet(average, step):
        model.compressor, model.b = average["compressor"], average["b"]
        images, captions = run.examples()
        run.save_sheet("b", step, [images, *model.reconstruct(images, captions, seed=0)], captions)

    average = fit(run, "b", network, run.picks(*tensors), loss_of, sheet)
    model.compressor, model.b = average["compressor"], average["b"]


@torch.no_grad()
def frozen_latents(run):
    """What Stage B learns from. Stage A and the text encoder no longer change, so their part is computed once.
    -> pictures as the compressor takes them (N, 3H/4, 3W/4, 3) uint8, A's latents (N, H/4, W/4, 4) and captions
    (N, L, width) float16; and the empty caption (L, width)"""
    small, latents, text = [], [], []
    for images, captions in run.cached("latents of Stage A"):
        with run.autocast():
            latents.append(run.model.a.encode(images).half().cpu())
            text.append(run.model.text_b(*run.tokens(captions)).half().cpu())
        small.append((shrink(images).clamp(0, 1) * 255).round().byte().cpu())
    return [torch.cat(x) for x in (small, latents, text)], run.model.text_b(*run.tokens([""])).half()


def train_c(run):
    """Stage C, on semantic latents computed once. Its text encoder is trained with it: with a frozen one, fewer captions
    come out right."""
    model = run.model
    semantic, captions = semantic_latents(run)
    model.c.latent_mean.copy_(semantic.mean(dim=(0, 1, 2)))
    model.c.latent_std.copy_(semantic.std(dim=(0, 1, 2)).clamp(min=1e-3))  # early on, a channel may be constant
    semantic = (semantic - model.c.latent_mean) / model.c.latent_std

    network = nn.ModuleDict(dict(text=copy.deepcopy(model.text_b), c=model.c))
    no_ids, no_mask = run.tokens([""])

    def loss_of(network, batch, step):
        x, ids, mask = batch
        drop = chance(0.05, ids)
        text = network["text"](torch.where(drop, no_ids, ids), torch.where(drop, no_mask, mask))
        t, noise = training_times(len(x), run.device), torch.randn_like(x)
        return diffusion_loss(noise, network["c"](add_noise(x, noise, t), t, text), t), {}

    def sheet(average, step):
        model.text, model.c = average["text"], average["c"]
        images, captions = run.examples()
        run.save_sheet("c", step, [images, model.generate(captions, seed=0)], captions)

    average = fit(run, "c", network, run.picks(semantic, *run.tokens(captions)), loss_of, sheet,
                  pace=lambda name: 0.1 if name.startswith("text") else 1)  # faster, it forgets what it knows
    model.text, model.c = average["text"], average["c"]


@torch.no_grad()
def semantic_latents(run):
    """The compressor's latents of the pictures that Stage C learns from, kept in semantic.pt. -> (N, hs, ws, 16),
    N captions"""
    path = run.folder / "semantic.pt"
    if path.exists():
        kept = torch.load(path, map_location=run.device, weights_only=True)
        return kept["semantic"], kept["captions"]
    semantic, captions = [], []
    for images, batch in run.cached("semantic latents"):
        with run.autocast():
            semantic.append(run.model.compress(images))
        captions += batch
    semantic = torch.cat(semantic)
    save_whole(path, dict(semantic=semantic, captions=captions))
    return semantic, captions


def chance(probability, x):
    """True with this probability for each row of x (B, ...) -> (B, 1, ...)"""
    return torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) < probability


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

TRAIN = {"text": train_text, "a": train_a, "b": train_b, "c": train_c}
NEEDS = {"text": (), "a": (), "b": ("text", "a"), "c": ("text", "a", "b")}
# Options that a run keeps from its first command to its last, and their defaults. The last two may be changed.
KEPT = {"preset": "tiny", "data": "shapes", "image_size": None, "seed": 0, "data_dir": None}
FIXED = ("preset", "data", "image_size")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train Würstchen: tokenizer, text encoder, stages A, B and C.")

    def add(name, help, **options):
        parser.add_argument(name, help=help + (" (default: %(default)s)" if options.get("default") else ""), **options)

    add("stage", nargs="?", default="all", choices=("all", "tokenizer", *TRAIN),
        help="what to train; all: every stage that isn't finished yet")
    add("--run", default="runs/tiny", help="folder of the run")
    add("--preset", help=f"sizes of the networks: {', '.join(PRESETS)} (default: tiny)")
    add("--data", choices=("shapes", "cifar10"), help="data set (default: shapes)")
    add("--data-dir", help="where the data set lies (shapes needs none)")
    add("--image-size", type=int, help="side of the pictures in pixels (default: the preset's)")
    add("--steps", type=int, help="steps of every stage named (default: the preset's recipe)")
    add("--batch-size", type=int, help="pictures a step (default: the preset's recipe)")
    add("--lr", type=float, help="highest learning rate (default: the preset's recipe)")
    add("--cache", type=int, help="pictures that stages B and C learn from: latents of A and of the compressor are "
        "computed once (default: the preset's)")
    add("--seed", type=int, help="of the data and the weights (default: 0)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--precision", default="auto", choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 autocast where this machine multiplies it faster")
    add("--workers", type=int, default=0, help="processes that prepare pictures; 0: none beside the main one")
    add("--log-every", type=int, default=10, help="steps between lines in metrics.jsonl")
    add("--sheet-every", type=int, default=250, help="steps between sheets of pictures")
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "lr", "image_size", "cache", "log_every", "sheet_every", "save_every"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be {'positive' if name == 'lr' else 'at least 1'}")
    return args


def read_options(folder):
    """The options that a run was begun with, {} if there is no such run."""
    path = Path(folder) / "options.json"
    return json.loads(path.read_text()) if path.exists() else {}


def pick_device(name):
    """"auto" is the best there is. ValueError if the machine lacks the one asked for."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[name]:
        raise ValueError(f"no {name} on this machine")
    return name


def bfloat16_is_faster(device):
    """Times a matrix product: some CPUs have instructions for bfloat16, others emulate it slowly."""
    def seconds(dtype):
        x = torch.randn(512, 512, device=device).to(dtype)
        (x @ x).sum().item()
        start = time.perf_counter()
        for _ in range(20):
            y = x @ x
        y.sum().item()  # waits for a GPU
        return time.perf_counter() - start
    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def main(argv=None):
    args = parse_args(argv)
    folder, begun = Path(args.run), read_options(args.run)
    for name in KEPT:  # what a run was begun with holds for its later commands too
        given = getattr(args, name)
        if given is None:
            setattr(args, name, begun.get(name, KEPT[name]))
        elif name in begun and given != begun[name] and name in FIXED:
            raise ValueError(f"{folder} was begun with --{name.replace('_', '-')} {begun[name]}; take another --run")
    if args.preset not in PRESETS:
        raise ValueError(f"unknown preset {args.preset!r}; there are {', '.join(PRESETS)}")
    config = copy.deepcopy(PRESETS[args.preset])
    config.text_b, config.b.text_width = config.text, config.text.width  # one contrastive training for both stages
    config.image_size = args.image_size = args.image_size or config.image_size
    if args.image_size < 1 or args.image_size % config.stride:
        raise ValueError(f"--image-size must be a multiple of {config.stride} for {args.preset}, not {args.image_size}")
    args.cache = args.cache or CACHE[args.preset]
    args.device = pick_device(args.device)
    if args.precision == "auto":
        args.precision = "bfloat16" if args.device != "mps" and bfloat16_is_faster(args.device) else "float32"

    start = time.time()
    if args.stage == "tokenizer" or args.stage == "all" and not (folder / "config.json").exists():
        save_config(folder, config, train_tokenizer(args, config))
        (folder / "options.json").write_text(json.dumps({name: getattr(args, name) for name in KEPT}) + "\n")
    for stage in TRAIN if args.stage == "all" else [args.stage] if args.stage in TRAIN else []:
        if args.stage == "all" and (folder / f"{stage}.pt").exists():
            print(f"stage {stage}: finished before")
            continue
        if stage == "b":  # what Stage C learned from belongs to the compressor before
            for name in ("semantic.pt", "c.ckpt"):
                (folder / name).unlink(missing_ok=True)
        torch.manual_seed(args.seed)  # a stage comes out the same alone and as part of `all`
        model = Wuerstchen.load(folder, NEEDS[stage]).to(args.device)
        TRAIN[stage](Run(args, model))
        model.save_stage(folder, stage)
        (folder / f"{stage}.ckpt").unlink(missing_ok=True)
    print(f"{folder}: done in {time.time() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # between the training loops, which save first
        sys.exit("stopped: the same command goes on")
