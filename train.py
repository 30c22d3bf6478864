"""
Trains Würstchen from nothing, stage by stage:

    python train.py                                      everything: Shapes, 128 px; under 15 minutes on two CPU cores
    python train.py --data cifar10 --data-dir DIR --flip --run runs/cifar
    python train.py --data folder --data-dir DIR --run runs/mine        pictures of one's own, with captions in .txt
    python train.py c --steps 5000                       one stage again, longer

The order is the paper's: tokenizer, text encoder (contrastively), Stage A, Stage B with its semantic compressor,
Stage C on the compressor's latents. Stage B reads the text encoder as it is; Stage C goes on training its own copy.
Not the authors', but what lets it learn in minutes: captions' wrong twins in the contrastive training, whose picture
side then is the compressor that Stage B slowly trains further; the optimizer Muon; a cosine for the learning rate.
What a run leaves in its folder:

    config.json, tokenizer/     sizes and vocabulary
    options.json                what the run was begun with
    text.pt a.pt b.pt c.pt      finished stages, as `Wuerstchen.load` reads them: the averaged (EMA) weights
    clip.pt                     the contrastive model whole, by which `sample.py --score` judges
    STAGE.ckpt                  an unfinished stage, to go on from
    latents/, semantic/         what stages B and C learn from, computed once; the former goes when B is finished
    metrics.jsonl               a line every few steps: loss, pictures a second, and what a stage measures at its end
    sheets/                     pictures of how far it is

Read it from top to bottom: Shapes, which draws its own data; data sets on disk; sheets of pictures; what several
processes share; the training loop of all stages; the stages; the command line. Who trains on Shapes, in one process,
can pass over the second and the fourth.
"""

import argparse
import copy
import csv
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import textwrap
import time
import urllib.request
import warnings
import zlib
from contextlib import ExitStack, nullcontext
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from tokenizer import Tokenizer, read_json
from wuerstchen import (CLIP, PRESETS, AttnBlock, Discriminator, ResBlock, StageB, StageC, VQBlock, Wuerstchen,
                        add_noise, codebook_usage, contrastive_loss, diffusion_loss, save_config, save_whole, shrink,
                        training_times)

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


def reserved(name):
    """Whether a caption or a file is kept for testing: one in sixteen, by a hash of its name, whatever the seed."""
    return zlib.crc32(name.encode()) % 16 == 0


def split_of(scene):
    """The one split a scene's caption belongs to."""
    if any((colour, shape) in HELD_OUT for _, colour, shape in scene.objects):
        return "heldout"
    return "test" if reserved(scene.caption()) else "train"


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

    skipped = []  # as of other data sets; here there are no bad pictures

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

    def captions(self, count):
        return map(self.caption, range(count))

    def __getitem__(self, index):
        caption, rng = self.start(index)
        return draw(caption, rng, self.size), caption

    def confuse(self, caption, rng):
        """Captions that are almost right: one with another size, colour or shape; of two objects, one of the same words
        where they exchange places, or sizes, colours or shapes. Without those that are kept from training."""
        scene = parse(caption)
        objects = [list(thing) for thing in scene.objects]
        thing = objects[rng.integers(len(objects))]
        part = rng.choice([part for part in range(3) if thing[part]])
        thing[part] = rng.choice([word for word in (SIZES, COLOURS, OUTLINES)[part] if word != thing[part]])
        wrong = []
        if len({(colour, shape) for _, colour, shape in objects}) == len(objects):  # no two alike
            wrong.append(Scene(objects, scene.relation, scene.background))
        if scene.relation:
            first, second = scene.objects
            ways = [part for part in range(3) if first[part] and second[part] and first[part] != second[part]]
            part = rng.choice([*ways, 3])  # 3: all at once
            first, second = zip(*((b, a) if part in (i, 3) else (a, b) for i, (a, b) in enumerate(zip(first, second))))
            wrong.append(Scene([first, second], scene.relation, scene.background))
        return [scene.caption() for scene in wrong if split_of(scene) in ("train", self.split)]


# ----------------------------------------------------------------------------------------------------------------------
# Data sets on disk. cifar, coco and folder list what is there: (picture, captions), the picture a path or an array, the
# captions a line each; `Pictures` makes a list endless. Tar, which may be too long to list, is read as a stream.

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "a small photo of a {}")
CIFAR = {  # folder, archive and its MD5, bytes of labels before the pixels (the last is meant), names of the labels
    "cifar10": ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 1,
                "batches.meta.txt"),
    "cifar100": ("cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 2,
                 "fine_label_names.txt"),
}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
IN_A_ROW = 100  # bad pictures after which a data set gives up
warnings.filterwarnings("ignore", module="PIL")  # what can't be read is named, the rest is read
warnings.filterwarnings("ignore", message="caption cut")  # a data set may have thousands too long for a small model


def cifar(place, split, data):
    """CIFAR-10 or CIFAR-100, binary version: a folder that holds cifar-10-batches-bin/ or cifar-100-binary/, or that
    folder, or the .tar.gz, which is unpacked beside itself. A record is its labels, then 32x32 red, green and blue
    values. -> [(array (32, 32, 3), captions)]. FileNotFoundError or ValueError says what is wrong."""
    folder, archive, _, skip, names = CIFAR[data]
    place = Path(place)
    if not place.exists():
        raise FileNotFoundError(f"no such data folder: {place}")
    inside = next((p for p in (place, place / folder, place.parent / folder) if (p / names).exists()), None)
    if not inside and (place.is_file() or (place / archive).exists()):
        inside = unpack(place if place.is_file() else place / archive, folder)
    pattern = re.compile(r"(data_batch_\d|train)\.bin" if split == "train" else r"test(_batch)?\.bin")
    files = sorted(path for path in inside.glob("*.bin") if pattern.fullmatch(path.name)) if inside else []
    if not files:
        raise FileNotFoundError(f"no {data} in {place}: neither {folder}/ with {names} and its .bin files nor "
                                f"{archive}, which --download fetches")
    captions = []
    for name in (inside / names).read_text().replace("_", " ").splitlines():
        article = "an" if name[:1] in "aeiou" else "a"
        captions.append("\n".join(TEMPLATES).replace("a {}", f"{article} {{}}").replace("{}", name))
    found = []
    for path in files:
        if not path.stat().st_size or path.stat().st_size % (skip + 3072):
            raise ValueError(f"{path} is not {data}: its size is no multiple of {skip + 3072} bytes")
        # Views into the file: what isn't looked at needs no memory.
        records = np.asarray(np.memmap(path, np.uint8, "r")).reshape(-1, skip + 3072)
        if (worst := records[:, skip - 1].max()) >= len(captions):
            raise ValueError(f"{path} is not {data}: a label is {worst}, but {names} has {len(captions)} names")
        found += [(r[skip:].reshape(3, 32, 32).transpose(1, 2, 0), captions[r[skip - 1]]) for r in records]
    return found


def unpack(archive, folder):
    """Unpacks one folder of a .tar.gz beside it, all or nothing -> its path. ValueError for a damaged archive and for
    one with a member that would leave the place (tarfile's "data" filter refuses it)."""
    print(f"unpacking {archive}")
    with tempfile.TemporaryDirectory(dir=archive.parent) as place:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(place, filter="data")
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise ValueError(f"{archive} can't be unpacked: {why(error)}") from None
        if not (Path(place) / folder).is_dir():
            raise ValueError(f"{archive} holds no {folder}/")
        return (Path(place) / folder).rename(archive.parent / folder)


def download(url, path, md5):
    """Fetches a file, or the rest of it if an earlier try broke off, and checks its MD5. ValueError if that differs,
    OSError if the connection breaks: the same command goes on from there."""
    part = Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            have = have if answer.status == 206 else 0  # a server that can't go on begins again
            total = have + int(answer.headers.get("Content-Length") or 0)
            with open(part, "ab" if have else "wb") as file, tqdm(
                    total=total, initial=have, desc=path.name, unit="B", unit_scale=True) as bar:
                while block := answer.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
        if part.stat().st_size < total:
            raise OSError(f"{total - part.stat().st_size} bytes are missing")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to fetch
            raise OSError(f"{url}: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}; the same command goes on from here") from None
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        part.unlink()
        raise ValueError(f"{url}: its MD5 is {found}, not {md5}; what came is deleted")
    part.rename(path)


def in_split(names, split):
    """Which names, of a data set without splits, belong to one: the first and those reserved are for testing. So (but
    for the first) a picture stays where it is when others join."""
    names = sorted(names)
    return [name for name in names if (name == names[0] or reserved(name)) == (split == "test")]


def coco(place, split):
    """MS COCO: annotations/captions_*.json and the folders of pictures, train2017/ and so on, or a part of them. Files
    of a validation split (captions_val*.json) are for testing, if there are any. -> [(path, captions)]"""
    files = sorted(Path(place).glob("annotations/captions_*.json"))
    if not files:
        raise FileNotFoundError(f"no annotations/captions_*.json in {place}")
    own = {"test": [f for f in files if "val" in f.name], "train": [f for f in files if "val" not in f.name]}
    captions = {}
    for file in own[split] if all(own.values()) else files:
        folder = file.stem.removeprefix("captions_")
        there = set(os.listdir(Path(place) / folder)) if (Path(place) / folder).is_dir() else ()
        listed = read_json(file)
        names = {image["id"]: f"{folder}/{image['file_name']}" for image in listed["images"]
                 if image["file_name"] in there}
        for note in listed["annotations"]:
            if note["image_id"] in names:
                captions.setdefault(names[note["image_id"]], []).append(" ".join(note["caption"].split()))
    if not captions:
        raise FileNotFoundError(f"none of the pictures that {files[0]} names is in {place}")
    return [(f"{place}/{name}", "\n".join(captions[name]))
            for name in (sorted(captions) if all(own.values()) else in_split(captions, split))]


def folder(place, split):
    """Pictures in a folder and in those within it. A caption is in the .txt of the same name (a line each, if there are
    several), or in a metadata.jsonl (file_name, text) or captions.csv or .tsv (file name, caption) that lies beside the
    picture or above it. -> [(path, captions)], None for the .txt"""
    if not os.path.isdir(place):
        raise FileNotFoundError(f"no such data folder: {place}")
    found, captions = [], {}
    for root, _, files in os.walk(place):
        def name_of(file):
            return os.path.relpath(os.path.join(root, file), place)
        found += [name_of(file) for file in files if file.lower().endswith(SUFFIXES)]
        for file in {"metadata.jsonl", "captions.csv", "captions.tsv"} & set(files):
            for name, text in read_captions(Path(root) / file):
                captions.setdefault(name_of(name), []).append(" ".join(text.split()))
    if not found:
        raise FileNotFoundError(f"no pictures ({', '.join(SUFFIXES)}) in {place}")
    return [(f"{place}/{name}", "\n".join(captions[name]) if name in captions else None)
            for name in in_split(found, split)]


def read_captions(path):
    """(file name, caption) of each line of a metadata.jsonl, captions.csv or captions.tsv. ValueError names a bad
    file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            if path.suffix == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
                return [(row["file_name"], row["text"]) for row in rows if row.get("text")]
            rows = [row[:2] for row in csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",") if row]
            header = not (path.parent / rows[0][0]).exists()
            return [(name, text) for name, text in rows[header:]]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, csv.Error) as error:
            raise ValueError(f"{path}: not a list of file names and captions: {error!r}") from None


def prepare(image, size, rng, random_crop, flip):
    """Any PIL image -> uint8 array (size, size, 3): upright, on white, its shorter side scaled to `size`, a square cut
    out of the longer one."""
    image.draft("RGB", (2 * size, 2 * size))  # a large JPEG needn't be decoded whole
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: convert() would cut off, not scale
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (int(rng.integers(side - size + 1)) if random_crop else (side - size) // 2 for side in image.size)
    image = image.crop((left, top, left + size, top + size))
    return np.array(ImageOps.mirror(image) if flip and rng.random() < 0.5 else image)


def why(error):
    return (str(error) or type(error).__name__).split("\n")[0][:200]


class Pictures:
    """The pictures of a list without end, in a new order in each pass. A bad one's place is taken by the next good one;
    `skipped` has (name, why) of those met since it was last emptied."""

    def __init__(self, found, size, seed, random_crop, flip):
        if not found:
            raise ValueError("a data set needs two pictures at least: one to learn from and one for testing")
        self.found, self.size, self.seed, self.random_crop, self.flip = found, size, seed, random_crop, flip
        self.skipped, self.epoch = [], None

    def __len__(self):
        """Pictures in a pass."""
        return len(self.found)

    def start(self, index):
        """A picture and its captions as listed, and the random numbers left for it."""
        epoch, i = divmod(index, len(self.found))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.found))
        return *self.found[self.order[i]], np.random.default_rng((self.seed, 1, index))

    def caption(self, index):
        """One of the captions, at random. ValueError if there is none."""
        picture, captions, rng = self.start(index)
        if captions is None and (path := Path(picture).with_suffix(".txt")).exists():
            captions = path.read_text(encoding="utf-8")
        lines = [line.strip() for line in (captions or "").splitlines() if line.strip()]
        if not lines:
            raise ValueError("no caption")
        return lines[rng.integers(len(lines))]

    def captions(self, count):
        for index in range(count):
            try:
                yield self.caption(index)
            except (ValueError, OSError):  # it is named when its picture is due
                pass

    def __getitem__(self, index):
        for index in range(index, index + IN_A_ROW):
            picture, _, rng = self.start(index)
            try:
                with Image.open(picture) if isinstance(picture, str) else Image.fromarray(picture) as image:
                    return prepare(image, self.size, rng, self.random_crop, self.flip), self.caption(index)
            except Exception as error:  # a decoder may throw anything at a damaged file
                self.skipped.append((str(picture), why(error)))
        raise ValueError(f"{IN_A_ROW} pictures in a row can't be used; the last: {': '.join(self.skipped[-1])}")


class Tar:
    """WebDataset shards (a folder of .tar, one file, or a pattern: data/{000..099}.tar), as img2dataset writes them:
    neighbours of one name are a sample, its picture beside a .txt or the "caption" of a .json. Only headers are read
    ahead, BUFFER samples of them, and drawn in random order; nothing is unpacked. `skipped` as in `Pictures`."""

    BUFFER = 10_000

    def __init__(self, place, split, size, seed, random_crop, flip):
        place, braces = str(place), re.search(r"\{(\d+)\.\.(\d+)\}", str(place))
        if braces:
            first, last = braces.groups()
            self.shards = [place.replace(braces[0], str(i).zfill(len(first))) for i in range(int(first), int(last) + 1)]
        else:
            self.shards = sorted(map(str, Path(place).glob("*.tar"))) if os.path.isdir(place) else [place]
        missing = [shard for shard in self.shards if not os.path.isfile(shard)]
        if missing or not self.shards:
            raise FileNotFoundError(f"no such shard: {missing[0]}" if missing else f"no .tar in {place}")
        self.split, self.size, self.seed, self.random_crop, self.flip = split, size, seed, random_crop, flip
        self.skipped = []

    def __len__(self):
        """Pictures in a pass, if all shards are as large as the first."""
        return max(1, sum(1 for _ in self.samples(self.shards[0]))) * len(self.shards)

    def samples(self, shard):
        """(shard, name, {extension: (offset, size)}) of each sample of the split."""
        def members(tar):
            for member in tar:
                tar.members = []  # tarfile would remember all
                if member.isfile():
                    yield re.fullmatch(r"((?:.*/)?[^/.]+)\.[^/]*|.*", member.name)[1], member
        try:
            with tarfile.open(shard, "r:") as tar:
                for i, (name, group) in enumerate(itertools.groupby(members(tar), key=lambda pair: pair[0])):
                    first = i == 0 and shard == self.shards[0]  # as in `in_split`
                    if name and (first or reserved(name)) == (self.split == "test"):
                        yield shard, name, {member.name[len(name):].lower(): (member.offset_data, member.size)
                                            for _, member in group}
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            self.skipped.append((shard, why(error)))

    def order(self, part=0, parts=1):
        """The samples of part number `part` of `parts`, without end. A part has shards of its own or, where there are
        fewer shards than parts, every parts-th sample."""
        for epoch in itertools.count():
            rng, buffer, own = np.random.default_rng((self.seed, epoch, part)), [], len(self.shards) >= parts
            count = 0
            for shard in rng.permutation(self.shards[part::parts] if own else self.shards):
                for sample in itertools.islice(self.samples(str(shard)), 0 if own else part, None, 1 if own else parts):
                    buffer.append(sample)
                    count += 1
                    if len(buffer) > self.BUFFER:
                        i = rng.integers(len(buffer))
                        buffer[i], buffer[-1] = buffer[-1], buffer[i]
                        yield buffer.pop()
            if count == 0:
                raise ValueError(f"no samples for process {part + 1} of {parts} in {self.shards[0]} and its neighbours"
                                 + "".join(f"; {name}: {reason}" for name, reason in self.skipped[:1]))
            rng.shuffle(buffer)
            yield from buffer

    def read(self, sample, extensions):
        """The bytes of the first of these extensions that a sample has."""
        shard, _, members = sample
        for extension in extensions:
            if extension in members:
                offset, size = members[extension]
                with open(shard, "rb") as file:
                    file.seek(offset)
                    return file.read(size)
        raise ValueError(f"no {' or '.join(extensions)} in the sample")

    def caption(self, sample):
        text = self.read(sample, (".txt", ".json")).decode()
        text = text if ".txt" in sample[2] else json.loads(text).get("caption") or ""
        if not text.strip():
            raise ValueError("no caption")
        return " ".join(text.split())

    def captions(self, count):
        for sample in itertools.islice(self.order(), count):
            try:
                yield self.caption(sample)
            except (ValueError, OSError, AttributeError):
                pass

    def stream(self, part=0, parts=1, skip=0):
        """(picture, caption) of a part, without the first `skip`, which cost no decoding. As in `Pictures`, a bad
        picture's place is taken by the next good one."""
        bad = 0
        for place, sample in enumerate(self.order(part, parts)):
            if place < skip:
                continue
            rng = np.random.default_rng((self.seed, part, place))
            try:
                with Image.open(io.BytesIO(self.read(sample, SUFFIXES))) as image:
                    found = prepare(image, self.size, rng, self.random_crop, self.flip), self.caption(sample)
            except Exception as error:
                self.skipped.append((f"{sample[0]}: {sample[1]}", why(error)))
                bad += 1
                if bad == IN_A_ROW:
                    raise ValueError(f"{bad} pictures in a row can't be used; the last: {': '.join(self.skipped[-1])}")
            else:
                yield from [found] * (bad + 1)
                bad = 0


def open_data(args, split="train"):
    """The data set that the options name. FileNotFoundError or ValueError says what is wrong with it."""
    if args.data == "shapes":
        return Shapes(args.image_size, args.seed, split)
    if args.data_dir is None:
        raise ValueError(f"--data {args.data} needs --data-dir")
    training = split == "train"
    how = args.image_size, args.seed, training and args.crop == "random", training and args.flip
    if args.data == "tar":
        return Tar(args.data_dir, split, *how)
    if args.data in CIFAR:
        return Pictures(cifar(args.data_dir, split, args.data), *how)
    return Pictures((coco if args.data == "coco" else folder)(args.data_dir, split), *how)


class Batches(IterableDataset):
    """Batches number `first` to `steps` - 1 of a data set: pictures (B, H, W, 3) uint8, B captions, and the (name, why)
    of those skipped. Each of several processes takes its share of every batch; its workers take turns."""

    def __init__(self, data, batch, first, steps, rank, ranks):
        self.data, self.batch, self.first, self.steps, self.rank, self.ranks = data, batch, first, steps, rank, ranks

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine, share = range(self.first + worker, self.steps, workers), self.batch // self.ranks
        if isinstance(self.data, Tar):
            turn = (self.first + worker) % workers  # whoever had a run's batches before it broke off has them again
            samples = self.data.stream(self.rank * workers + turn, self.ranks * workers,
                                       skip=len(range(turn, self.first, workers)) * share)
        else:
            samples = (self.data[step * self.batch + self.rank * share + i] for step in mine for i in range(share))
        for _ in mine:
            pictures, captions = zip(*itertools.islice(samples, share))
            yield torch.from_numpy(np.stack(pictures)), list(captions), list(self.data.skipped)
            self.data.skipped.clear()


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
# Several processes (torchrun). Each has a copy of the networks and its share of every batch; DistributedDataParallel
# averages their gradients. The rest of what must be shared is here.


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait_for_all():
    if ranks() > 1:
        distributed.barrier()


class AllReduce(torch.autograd.Function):
    """The sum over all processes. Each of them goes on from it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return AllReduce.forward(ctx, gradient.contiguous())


def gather(x):
    """Rows (n, ...) of every process, n may differ -> rows of all (N, ...), the same everywhere; differentiable."""
    if ranks() == 1:
        return x
    counts = torch.zeros(ranks(), dtype=torch.long, device=x.device)
    counts[rank()] = len(x)
    distributed.all_reduce(counts)
    before, after = int(counts[:rank()].sum()), int(counts[rank() + 1:].sum())
    return AllReduce.apply(F.pad(x, (0, 0) * (x.dim() - 1) + (before, after)))


def share_statistics(norm):
    """Makes a BatchNorm in training use the mean and variance of all processes' pictures, so that the result doesn't
    depend on how a batch is split. (nn.SyncBatchNorm does so on GPUs only.)"""
    def forward(x):
        if not norm.training:
            return type(norm).forward(norm, x)
        axes, rest = [0, *range(2, x.dim())], (-1, *[1] * (x.dim() - 2))
        mean, square = AllReduce.apply(torch.stack([x.float().mean(axes), x.float().square().mean(axes)])) / ranks()
        variance, count = square - mean.square(), x.numel() // x.shape[1] * ranks()
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
        scale = norm.weight * (variance + norm.eps).rsqrt()
        return (x * scale.view(rest) + (norm.bias - mean * scale).view(rest)).to(x.dtype)
    norm.forward = forward


# ----------------------------------------------------------------------------------------------------------------------
# The training loop that all stages share.


@dataclass
class Recipe:
    steps: int
    batch: int
    lr: float


RECIPES = {
    "tiny": dict(text=Recipe(500, 64, 5e-4), a=Recipe(900, 32, 4e-3), b=Recipe(2650, 32, 1.2e-3),
                 c=Recipe(500, 128, 1.5e-3)),
    "small": dict(text=Recipe(20_000, 256, 5e-4), a=Recipe(40_000, 32, 3e-4), b=Recipe(100_000, 64, 2e-4),
                  c=Recipe(100_000, 256, 2e-4)),
    "v2": dict(text=Recipe(200_000, 1024, 1e-4), a=Recipe(200_000, 64, 1e-4), b=Recipe(300_000, 384, 1e-4),
               c=Recipe(900_000, 1280, 1e-4)),
}
# Pictures that stages B and C learn from, where --cache doesn't say. They take disk: tiny 42 kB each, v2 2.4 MB.
CACHE = {"tiny": 16_384, "small": 50_000, "v2": 8192}


class Run:
    """What every stage needs: the options, the model so far, the data, the log."""

    def __init__(self, args):
        self.args, self.device, self.folder = args, args.device, Path(args.run)
        self.rank, self.ranks = rank(), ranks()
        self.train_data, self.test_data = open_data(args, "train"), open_data(args, "test")
        self.seen, self.failures, self.skipped = 0, 0, {}

    def take(self, model, given):
        """The networks so far; given: the stage goes on from weights of its own."""
        self.model, self.config, self.given = model, model.config, given

    def recipe(self, stage):
        recipe = RECIPES[self.args.preset][stage]
        return Recipe(self.args.steps or recipe.steps, self.args.batch_size or recipe.batch, self.args.lr or recipe.lr)

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], getattr(torch, self.args.precision),
                              enabled=self.args.precision != "float32")

    def log(self, **numbers):
        if self.rank == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                numbers = {k: round(v, 6) if isinstance(v, float) else v for k, v in numbers.items()}
                file.write(json.dumps(numbers) + "\n")

    def batches(self, data, batch, first, steps, alone=False):
        """This process's share (all, if alone) of batches number `first` to `steps` - 1 of a data set: images
        (B, H, W, 3) in [0, 1], B captions. ValueError when more than a tenth of the pictures can't be used."""
        feed = Batches(data, batch, first, steps, *((0, 1) if alone else (self.rank, self.ranks)))
        loader = DataLoader(feed, batch_size=None, num_workers=self.args.workers if steps - first > 1 else 0,
                            worker_init_fn=default_signals, generator=torch.Generator())  # not from the global one
        for images, captions, skipped in loader:
            self.account(data, len(captions), skipped)
            yield self.send(images) / 255, captions

    def send(self, x):
        """A tensor to where it is computed with. From pinned memory a GPU fetches it by itself, while it computes."""
        return x.pin_memory().to(self.device, non_blocking=True) if "cuda" in self.device else x.to(self.device)

    def account(self, data, seen, skipped):
        for name, reason in skipped:
            if name not in self.skipped:
                self.skipped[name] = reason
                self.log(skipped=name, why=reason)
        if data is self.train_data:
            self.seen, self.failures = self.seen + seen, self.failures + len(skipped)
            if skipped and self.failures > max(self.seen, len(data) / self.ranks) / 10:
                raise ValueError(f"more than a tenth of the pictures can't be used: {self.failures} after {self.seen} "
                                 f"that can; {name}, because: {reason}; metrics.jsonl in {self.folder} names all")

    def report(self):
        """One line on the pictures that had to be skipped."""
        everyone = [self.skipped] * self.ranks
        if self.ranks > 1:
            distributed.all_gather_object(everyone, self.skipped)
            for name, reason in {name: reason for others in everyone[1:] for name, reason in others.items()}.items():
                self.log(skipped=name, why=reason)
        if count := len(set().union(*everyone)):
            print(f"skipped, as they can't be used: {count} pictures, named in {self.folder / 'metrics.jsonl'}")

    def train_batches(self, first, recipe):
        return self.batches(self.train_data, recipe.batch, first, recipe.steps)

    def cached(self, name, compute):
        """What compute(images, captions) -> {key: tensor (B, ...)} makes of the first --cache pictures, rounded up to
        whole batches of 64. Computed once and kept on disk, not in memory. -> {key: array (N, ...), memory-mapped}"""
        folder, options = self.folder / name, {key: getattr(self.args, key) for key in (*KEPT, "cache")}
        kept = read_json(folder / "made_of.json") if (folder / "made_of.json").exists() else {}
        if kept.get("options") != options:
            folder.mkdir(exist_ok=True)
            (folder / "made_of.json").unlink(missing_ok=True)  # written anew when all else is
            share = max(1, 64 // self.ranks)  # pictures of a batch that are this process's
            steps, files, shapes = -(-self.args.cache // (share * self.ranks)), {}, {}
            batches = self.batches(self.train_data, share * self.ranks, 0, steps)
            with ExitStack() as opened:
                for step, batch in enumerate(tqdm(batches, desc=name, total=steps, disable=self.rank > 0)):
                    with torch.no_grad(), self.autocast():
                        arrays = {key: x.cpu().numpy() for key, x in compute(*batch).items()}
                    for key, x in arrays.items():
                        if key not in files:  # no "w": another process may be writing to it
                            file = os.open(folder / f"{key}.bin", os.O_CREAT | os.O_WRONLY)
                            files[key] = opened.enter_context(open(file, "wb"))
                            shapes[key] = str(x.dtype), (steps * share * self.ranks, *x.shape[1:])
                        files[key].seek((step * self.ranks + self.rank) * x.nbytes)
                        files[key].write(x.tobytes())
            wait_for_all()
            kept = dict(options=options, arrays=shapes)
            if self.rank == 0:
                (folder / "made_of.json").write_text(json.dumps(kept) + "\n")
        return {key: np.memmap(folder / f"{key}.bin", dtype, "r", shape=tuple(shape))
                for key, (dtype, shape) in kept["arrays"].items()}

    def picks(self, arrays):
        """A function that gives `fit` batches of what was computed once: {key: rows of an array (N, ...)}"""
        count = len(next(iter(arrays.values())))

        def batches(first, recipe):
            share = recipe.batch // self.ranks
            for step in range(first, recipe.steps):
                rows = np.random.default_rng((self.args.seed, step)).integers(count, size=recipe.batch)
                rows = rows[self.rank * share:][:share]
                yield [self.send(torch.from_numpy(x[rows])) for x in arrays.values()]
        return batches

    def examples(self, count=8):
        """The same few test pictures for every sheet."""
        return next(self.batches(self.test_data, count, 0, 1, alone=True))

    def tokens(self, captions, tokenizer):
        """ids and mask (B, L). The published stages have a tokenizer each, runs of one's own the same one twice."""
        return [x.to(self.device) for x in tokenizer(captions)]

    def save_sheet(self, stage, step, rows, captions):
        folder = self.folder / "sheets"
        folder.mkdir(exist_ok=True)
        make_sheet(rows, captions).save(folder / f"{stage}_{step:06d}.png")


class Objective(nn.Module):
    """A stage's networks with their loss as `forward`, which is what DistributedDataParallel can wrap."""

    def __init__(self, network, loss_of):
        super().__init__()
        self.network, self.loss_of = network, loss_of

    def forward(self, batch, step):
        loss, numbers = self.loss_of(self.network, batch, step)
        return loss, {key: x.detach() if torch.is_tensor(x) else x for key, x in numbers.items()}


def update_average(average, network, step):
    """Exponential moving average of the weights, over about the last tenth of the run so far (at most 1,000 steps:
    the authors' 0.9 every 100 steps). BatchNorm's statistics are copied."""
    decay = min(0.999, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    copy_buffers(average, network)


def copy_buffers(to, network):
    for old, new in zip(to.buffers(), network.buffers()):
        old.copy_(new)


def random_states():
    """Of all generators that training draws from, of every process. Data comes by index and needs none."""
    mine = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    states = [mine] * ranks()
    if ranks() > 1:
        distributed.all_gather_object(states, mine)
    return states


def set_random_state(states):
    """Of this process; with more processes than before, the new ones keep their own."""
    if rank() < len(states):
        cpu, *gpus = [state.cpu() for state in states[rank()]]
        torch.set_rng_state(cpu)
        if gpus and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(gpus)


def default_signals(worker):
    """In a process that prepares pictures: Ctrl-C is the main one's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Muon(torch.optim.Optimizer):
    """Momentum, all of whose directions are made equally long (Jordan et al., 2024): its singular values become about
    1. torch.optim.Muon takes one matrix after the other, which was a quarter of a step's time; here all of one shape go
    together. Steps are as long as AdamW's."""

    def __init__(self, groups, momentum=0.95, weight_decay=0.01):
        super().__init__(groups, dict(lr=0.0, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for shape, params in alike.items():
                means = [self.state[p].setdefault("mean", torch.zeros_like(p)) for p in params]
                gradients = [p.grad for p in params]
                torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
                updates = orthogonal(torch.stack(torch._foreach_lerp(gradients, means, group["momentum"])))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(x):
    """About the nearest orthogonal matrices to x (N, m, n), by five Newton-Schulz steps with Jordan's coefficients:
    products alone, for which bfloat16 is exact enough."""
    tall = x.shape[1] > x.shape[2]
    y = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    y = y.mT if tall else y
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), y, beta=3.4445)
    return (y.mT if tall else y).to(x.dtype)


def make_optimizers(network, pace, muon):
    """AdamW, as the authors have it. With `muon`, large matrices learn by Muon instead: stages B and C then need far
    fewer pictures. pace(name): what a parameter's learning rate is multiplied by."""
    large = {m.weight for m in network.modules() if muon and isinstance(m, nn.Linear) and min(m.weight.shape) >= 64}
    groups = {}
    for name, p in network.named_parameters():
        groups.setdefault((p in large, pace(name)), []).append(p)

    def of(kind, factor):
        return [dict(params=params, pace=factor * x) for (is_large, x), params in groups.items() if is_large == kind]

    optimizers = [torch.optim.AdamW(of(False, 1), betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    if large:  # its steps can be three times longer
        optimizers.append(Muon(of(True, 3)))
    return optimizers


LAYOUT = 2  # of checkpoints; a change of what is in them is a new number


def read_checkpoint(path, preset, device):
    """A checkpoint that `fit` wrote. ValueError names what it is if it can't be gone on with."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged: {why(error)}") from None
    if not isinstance(state, dict) or state.get("layout") != LAYOUT:
        raise ValueError(f"{path} is a checkpoint of another layout than this train.py's: delete it to begin the stage "
                         "again")
    if state["preset"] != preset:
        raise ValueError(f"{path} is a checkpoint of preset {state['preset']}, not {preset}")
    return state


def fit(run, stage, network, batches, loss_of, show, pace=lambda name: 1, muon=True):
    """Trains `network` and returns its moving average.

    batches(first, recipe) yields batches from step `first` on; loss_of(network, batch, step) gives the loss and a dict
    of numbers to log; show(average, step) saves a sheet, or measures; pace and muon as in `make_optimizers`. Ctrl-C
    saves a checkpoint, as do every --save-every steps, and the next call goes on from it."""
    args, recipe, path = run.args, run.recipe(stage), run.folder / f"{stage}.ckpt"
    if recipe.batch % (run.ranks * args.accumulate):
        raise ValueError(f"a batch of {recipe.batch} can't be split into {run.ranks * args.accumulate} equal parts")
    average = copy.deepcopy(network).eval().requires_grad_(False)
    network.train()
    optimizers = make_optimizers(network, pace, muon)
    step, warm_up = 0, min(10_000, recipe.steps // 20 + 1)
    scale = 2.0**12 if args.precision == "float16" else 1.0  # small gradients would vanish in float16
    if args.recompute:
        for module in network.modules():
            if isinstance(module, (ResBlock, AttnBlock, VQBlock)):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    for part in network.children():
        if args.compile and isinstance(part, (StageB, StageC)):  # torch 2.13 fails to compile Stage A's padding
            part.compile()
    if run.rank > 0:  # the networks began alike everywhere; what is drawn from now on differs
        torch.manual_seed(args.seed + run.rank)
    if path.exists():
        state = read_checkpoint(path, args.preset, run.device)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        step = state["step"]
        set_random_state(state["random"])
        print(f"stage {stage}: going on from step {step}")
        if Recipe(*state["recipe"]) != recipe:
            print("  it was begun with --steps {} --batch-size {} --lr {}".format(*state["recipe"])
                  + ", now with --steps {} --batch-size {} --lr {}".format(*astuple(recipe)))
    objective = Objective(network, loss_of)
    if run.ranks > 1:
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                share_statistics(module)
        # Stage A's discriminator joins late.
        objective = DistributedDataParallel(objective, find_unused_parameters=stage == "a")

    def save():
        state = dict(layout=LAYOUT, preset=args.preset, recipe=astuple(recipe), step=step,
                     network=network.state_dict(), average=average.state_dict(),
                     optimizers=[optimizer.state_dict() for optimizer in optimizers], random=random_states())
        if run.rank == 0:
            save_whole(path, state)

    stop = []  # Ctrl-C or a polite kill: the step under way ends first
    before = {number: signal.signal(number, lambda number, _: stop.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    start, first, spoiled, in_a_row = time.time(), step, 0, 0
    bar = tqdm(total=recipe.steps, initial=step, desc=f"stage {stage}" if len(stage) == 1 else stage, unit="step",
               disable=run.rank > 0)
    for batch in batches(step, recipe):
        # Linear warm-up as the authors do; then a cosine down to 0, which a run of minutes needs more than theirs did.
        rate = min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate * group["pace"]
        network.zero_grad()
        size = len(batch[0]) // args.accumulate
        for i in range(args.accumulate):
            last = i == args.accumulate - 1  # before it, gradients needn't be averaged over the processes
            with nullcontext() if last or run.ranks == 1 else objective.no_sync():
                with run.autocast():
                    loss, numbers = objective([x[i * size:(i + 1) * size] for x in batch], step)
                (loss * (scale / args.accumulate)).backward()
        if scale != 1:
            torch._foreach_mul_([p.grad for p in network.parameters() if p.grad is not None], 1 / scale)
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
        # What one process meets, all must act on together.
        news = torch.stack([torch.tensor(float(max(stop, default=0)), device=run.device),
                            1 - (loss.isfinite() & norm.isfinite()).float()]).detach()
        if run.ranks > 1:
            distributed.all_reduce(news, distributed.ReduceOp.MAX)
        stopped, bad = (int(x) for x in news.tolist())
        if bad:
            copy_buffers(network, average)  # BatchNorm's statistics are spoiled too
            spoiled, in_a_row, scale = spoiled + 1, in_a_row + 1, max(1.0, scale / 2)
            run.log(stage=stage, step=step + 1, not_finite=spoiled)
            if in_a_row == 10:
                kept = f"{path} holds the last good state" if path.exists() else "nothing was saved yet"
                raise ValueError(f"stage {stage}: ten steps in a row without a finite loss and gradient, up to step "
                                 f"{step + 1}; {kept}. A lower --lr may help")
        else:
            in_a_row = 0
            for optimizer in optimizers:
                optimizer.step()
            update_average(average, network, step)
        step += 1
        bar.update()
        if not bad and (step % args.log_every == 0 or step == recipe.steps):
            speed = (step - first) * recipe.batch / (time.time() - start)
            bar.set_postfix_str(f"loss {loss.item():.4f}, {speed:.0f} images/s")
            run.log(stage=stage, step=step, loss=loss.item(), images_per_s=speed, seconds=time.time() - start,
                    **{k: v.item() if torch.is_tensor(v) else v for k, v in numbers.items()})
        if run.rank == 0 and (step % args.sheet_every == 0 or step == recipe.steps):
            show(average, step)
        if run.ranks == 1:  # a signal that came after the news, while the last sheet was drawn say
            stopped = max(stop, default=0)
        if in_a_row == 0 and step % args.save_every == 0 or stopped:
            save()
        if stopped:
            bar.close()
            print(f"stopped in stage {stage} after step {step} of {recipe.steps}; to go on from there: "
                  f"{shlex.join(['python', *sys.argv])}", file=sys.stderr if run.rank == 0 else sys.stdout)
            sys.exit(128 + stopped)
    bar.close()
    if spoiled:
        print(f"stage {stage}: {spoiled} steps without a finite loss and gradient were skipped")
    for number, handler in before.items():
        signal.signal(number, handler)
    return average


# ----------------------------------------------------------------------------------------------------------------------
# The stages.


def train_tokenizer(args, config, captions=20_000):
    """Byte-pair merges learned on the training captions, until the vocabulary is full or no pair comes twice."""
    room = config.text.vocab_size - 514  # bytes, bytes that end a word, start and end token
    tokenizer = Tokenizer.train(open_data(args).captions(captions), room, config.text.length)
    config.text.vocab_size = len(tokenizer)
    print(f"tokenizer: {len(tokenizer)} tokens")
    return tokenizer


def train_text(run):
    """The text encoder, contrastively against an EfficientNet. (The authors take OpenCLIP's, trained just so.)

    Among random captions a list of the words suffices to find the right one, so nothing would be learned of which word
    belongs to which (Yuksekgonul et al., 2023). Hence each caption's wrong twins join them: the same words exchanged,
    and, so that no word is passed over, one of them replaced.
    """
    seed = run.args.seed

    def with_twins(data, captions, rng):
        """-> a list of wrong captions for each (only Shapes can make them); ids and mask of the captions and then of
        all those"""
        twins = [data.confuse(caption, rng) if run.args.data == "shapes" else [] for caption in captions]
        return twins, *run.tokens(captions + sum(twins, []), run.model.tokenizer_b)

    def loss_of(clip, batch, step):
        images, captions = batch
        _, ids, mask = with_twins(run.train_data, captions, np.random.default_rng((seed, step)))
        image, text = clip.embed_images(images), clip.embed_text(ids, mask)
        # The pictures of all processes against the captions of all, which come before the twins.
        n = len(captions)
        text, ids = (torch.cat([gather(x[:n]), gather(x[n:])]) for x in (text, ids))
        return contrastive_loss(clip.compare(gather(image), text), ids), {}

    @torch.no_grad()
    def measure(clip, step):
        """For what share of 256 test pictures their own caption fits best, and in what share of pairs beats a twin."""
        images, captions = run.examples(256)
        twins, ids, mask = with_twins(run.test_data, captions, np.random.default_rng(seed))
        rows = [i for i, wrong in enumerate(twins) for _ in wrong]
        logits = clip(images, ids, mask)
        best = logits[:, :256].argmax(dim=1)
        numbers = dict(accuracy=(ids[best] == ids[:256]).all(dim=1).float().mean().item())
        if rows:
            better = logits[rows, rows] > logits[rows, range(256, len(ids))]
            numbers["twins_told_apart"] = better.float().mean().item()
        run.log(stage="text", step=step, **numbers)

    clip = CLIP(run.config)
    clip.text, clip.image = run.model.text_b, run.model.compressor.backbone  # the latter is where Stage B's starts
    clip = fit(run, "text", clip.to(run.device), run.train_batches, loss_of, measure)
    run.model.text_b, run.model.compressor.backbone = clip.text, clip.image
    if run.rank == 0:
        save_whole(run.folder / "clip.pt", clip.state_dict())


def train_a(run):
    """The VQGAN. It learns from pieces with half the picture's side, as nothing in it looks far: twice as many pictures
    in half the time. Its discriminator joins for the last quarter, when there is something to refine."""
    cfg, steps, side = run.config.a, run.recipe("a").steps, max(32, run.config.image_size // 2)
    depth = min(cfg.disc_depth, side.bit_length() - 2)  # leaves at least 2x2 patches, which InstanceNorm needs
    network = nn.ModuleDict(dict(a=run.model.a, discriminator=Discriminator(depth, cfg.disc_width)))
    network.register_buffer("idle", torch.full((cfg.codebook_size,), math.inf))  # in the checkpoint, not in a.pt

    def loss_of(network, batch, step):
        vqgan, discriminator = network["a"], network["discriminator"]
        images = crop(batch[0], side)
        reconstruction, latents, codes, vq_loss = vqgan(images)
        revived = vqgan.quantizer.revive(gather(latents.detach()), gather(codes), network.idle, patience=50)
        if run.ranks > 1:  # each process drew other latents
            distributed.broadcast(vqgan.quantizer.codebook.data, 0)
        mse = F.mse_loss(reconstruction, images)
        loss = 10 * mse + F.l1_loss(reconstruction, images) + vq_loss  # the square is far smaller; once: 2 dB less
        numbers = dict(mse=mse, vq_loss=vq_loss, revived=revived)
        if step >= 3 * steps // 4:
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
    if run.rank == 0:
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
    for images, _ in run.batches(run.test_data, 32, 0, 8, alone=True):
        reconstruction, latents, batch_codes, _ = run.model.a(images)
        unquantized = run.model.a.decode(latents)
        errors.append(torch.stack([(x.clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
                                   for x in (reconstruction, unquantized)]))
        codes.append(batch_codes)
        deviation.append(latents.std())
    psnr, psnr_unquantized = (-10 * torch.cat(errors, dim=1).log10()).mean(dim=1).tolist()
    usage, perplexity = codebook_usage(torch.cat(codes), run.config.a.codebook_size)
    # Three times the deviation, and large flat shapes hide in the noise long enough for B to ask the semantic latents
    # where they are and of what colour.
    run.model.a.scale.fill_(3 * torch.stack(deviation).mean())
    run.log(stage="a", psnr=psnr, psnr_unquantized=psnr_unquantized, codebook_usage=usage, perplexity=perplexity)
    print(f"stage A: PSNR {psnr:.1f} dB ({psnr_unquantized:.1f} without the quantizer), "
          f"{usage:.0%} of the codebook in use, perplexity {perplexity:.0f}")


def train_b(run):
    """Stage B, and the semantic compressor with it: what the compressor keeps is what helps B to draw."""
    model = run.model

    def compute(images, captions):
        """Stage A and the text encoder no longer change, so their part is computed once: pictures as the compressor
        takes them (B, 3H/4, 3W/4, 3) uint8, A's latents (B, H/4, W/4, 4) and captions (B, L, width) float16"""
        return dict(small=(shrink(images).clamp(0, 1) * 255).round().byte(), latents=model.a.encode(images).half(),
                    text=model.text_b(*run.tokens(captions, model.tokenizer_b)).half())

    arrays = run.cached("latents", compute)
    if not run.given:
        begin_mapper(model.compressor, map(run.send, torch.tensor(arrays["small"][:1024]).split(32)))
    with torch.no_grad():
        nothing = model.text_b(*run.tokens([""], model.tokenizer_b)).half()
    network = nn.ModuleDict(dict(compressor=model.compressor, b=model.b))

    def loss_of(network, batch, step):
        small, latents, text = batch
        # The authors leave out 5 % of the captions. Shapes' say nearly all there is to see: B would read colours and
        # shapes off them, and pay no heed to the semantic latents.
        bare = chance(0.25, text)
        text = torch.where(bare, nothing, text).float()
        semantic = network["compressor"](small / 255).float()
        # B must draw from what C will give it, which is never quite right, and must know what "nothing" looks like:
        # 5 % of the semantic latents are zeroed, and of those with a caption, 30 % noised.
        n = len(small)
        noised = add_noise(semantic, torch.randn_like(semantic), torch.rand(n, device=run.device) / 2)
        semantic = torch.where(chance(0.3, semantic) & ~bare[..., None], noised, semantic)
        semantic = torch.where(chance(0.05, semantic), 0, semantic)
        latents = latents.float() / model.a.scale
        t, noise = training_times(n, run.device), torch.randn_like(latents)
        predicted = network["b"](add_noise(latents, noise, t), t, semantic, text)
        return diffusion_loss(noise, predicted, t), {}

    def sheet(average, step):
        model.compressor, model.b = average["compressor"], average["b"]
        images, captions = run.examples()
        run.save_sheet("b", step, [images, *model.reconstruct(images, captions, seed=0)], captions)

    # The compressor begins as the contrastive model's picture side, which tells shapes and colours apart. B learns to
    # read it while it moves slowly.
    average = fit(run, "b", network, run.picks(arrays), loss_of, sheet,
                  pace=lambda name: 0.2 if name.startswith("compressor") else 1)
    model.compressor, model.b = average["compressor"], average["b"]


@torch.no_grad()
def begin_mapper(compressor, small):
    """Has the compressor keep, of its backbone's features, the principal components of small pictures, batches
    (B, H, W, 3) uint8: through the random directions of fresh weights, B would see far less of the shapes."""
    features = torch.cat([compressor.backbone(x / 255) for x in small])
    _, directions = torch.linalg.eigh(features.flatten(0, 2).T.cov())  # by rising variance
    compressor.mapper.weight.copy_(directions[:, -compressor.mapper.out_features:].T)


def train_c(run):
    """Stage C, on semantic latents computed once. Its text encoder is trained with it: Shapes' has seen so few captions
    that with a frozen one, fewer come out right. With --freeze-text, as in the paper, its part is computed once too."""
    model, frozen = run.model, run.args.freeze_text
    if not run.given:
        model.text = copy.deepcopy(model.text_b)

    def compute(images, captions):
        ids, mask = run.tokens(captions, model.tokenizer)
        text = dict(text=model.text(ids, mask).half()) if frozen else dict(ids=ids, mask=mask)
        return dict(semantic=model.compress(images)) | text

    arrays = run.cached("semantic", compute)
    # Measured for given weights too: at another size, the same C then learns in half the steps. Early on, a channel may
    # be constant.
    semantic = arrays["semantic"]
    model.c.latent_mean.copy_(torch.from_numpy(semantic.mean(axis=(0, 1, 2))))
    model.c.latent_std.copy_(torch.from_numpy(semantic.std(axis=(0, 1, 2)).clip(1e-3)))
    network = nn.ModuleDict(dict(c=model.c) if frozen else dict(text=model.text, c=model.c))
    no_ids, no_mask = run.tokens([""], model.tokenizer)
    with torch.no_grad():
        nothing = model.text(no_ids, no_mask) if frozen else None

    def loss_of(network, batch, step):
        x, *text = batch
        x = (x - model.c.latent_mean) / model.c.latent_std
        drop = chance(0.05, x).view(-1, 1)
        if frozen:
            text = torch.where(drop[..., None], nothing, text[0].float())
        else:
            text = network["text"](torch.where(drop, no_ids, text[0]), torch.where(drop, no_mask, text[1]))
        t, noise = training_times(len(x), run.device), torch.randn_like(x)
        return diffusion_loss(noise, network["c"](add_noise(x, noise, t), t, text), t), {}

    def take(average):
        for name, part in average.items():
            setattr(model, name, part)

    def sheet(average, step):
        take(average)
        images, captions = run.examples()
        run.save_sheet("c", step, [images, model.generate(captions, seed=0)], captions)

    take(fit(run, "c", network, run.picks(arrays), loss_of, sheet,
             pace=lambda name: 0.1 if name.startswith("text") else 1))  # faster, it forgets what it knows


def chance(probability, x):
    """True with this probability for each row of x (B, ...) -> (B, 1, ...)"""
    return torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) < probability


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

TRAIN = {"text": train_text, "a": train_a, "b": train_b, "c": train_c}
NEEDS = {"text": (), "a": (), "b": ("text", "a"), "c": ("text", "a", "b")}
# Options that a run keeps from its first command to its last, and their defaults. Those that are not FIXED may change.
KEPT = {"preset": "tiny", "data": "shapes", "image_size": None, "init_from": None, "seed": 0, "data_dir": None,
        "crop": "centre", "flip": False, "precision": None, "freeze_text": False}
FIXED = ("preset", "data", "image_size", "init_from")
# What no longer fits when a stage is finished anew, or isn't needed any more.
OUTDATED = {"text": ("latents", "b.ckpt"), "a": ("latents", "b.ckpt"), "b": ("latents", "semantic", "c.ckpt"), "c": ()}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train Würstchen: tokenizer, text encoder, stages A, B and C. Under "
                                     "torchrun, with several processes.")

    def add(*names, help, **options):
        default = " (default: %(default)s)" if options.get("default") else ""
        parser.add_argument(*names, help=help + default, **options)

    add("stage", nargs="?", default="all", choices=("all", "tokenizer", *TRAIN),
        help="what to train; all: every stage that isn't finished yet")
    add("--run", "--run-dir", default="runs/tiny", help="folder of the run; under torchrun, say --run-dir: it takes "
        "--run for an option of its own")
    add("--preset", help=f"sizes of the networks: {', '.join(PRESETS)} (default: tiny)")
    add("--init-from", metavar="RUN", help="begin --run with the weights of another run, or of a folder with the "
        "published snapshots, and train the stage named from there")
    add("--data", choices=("shapes", *CIFAR, "coco", "folder", "tar"), help="data set (default: shapes)")
    add("--data-dir", help="where the data set lies (shapes needs none)")
    add("--download", action="store_true", help="fetch CIFAR-10 or CIFAR-100 into --data-dir first (default: data)")
    add("--image-size", type=int, help="side of the pictures in pixels (default: the preset's)")
    add("--crop", choices=("centre", "random"), help="which square of a picture is trained on (default: centre)")
    add("--flip", action="store_true", default=None, help="mirror every other picture; not where captions say left "
        "and right")
    add("--steps", type=int, help="steps of every stage named (default: the preset's recipe)")
    add("--batch-size", type=int, help="pictures a step, of all processes (default: the preset's recipe)")
    add("--accumulate", type=int, default=1, help="parts that a batch is computed in, one after the other")
    add("--lr", type=float, help="highest learning rate (default: the preset's recipe)")
    add("--cache", type=int, help="pictures that stages B and C learn from: latents of A and of the compressor are "
        "computed once (default: the preset's)")
    add("--seed", type=int, help="of the data and the weights (default: 0)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--freeze-text", action="store_true", default=None, help="Stage C: leave the text encoder as it is, and "
        "compute its part once")
    add("--precision", choices=("float32", "bfloat16", "float16"), help="of matrix products (default: bfloat16 where "
        "the machine that begins the run multiplies it faster, float16 on a GPU without it)")
    add("--compile", action="store_true", help="compile stages B and C: minutes at first, then faster steps on a GPU")
    add("--recompute", action="store_true", help="keep no activations inside the blocks but compute them again for the "
        "gradient: less memory, more time")
    add("--workers", type=int, default=0, help="processes that prepare pictures; 0: none beside the main one")
    add("--log-every", type=int, default=10, help="steps between lines in metrics.jsonl")
    add("--sheet-every", type=int, default=250, help="steps between sheets of pictures")
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "accumulate", "lr", "image_size", "cache", "log_every", "sheet_every",
                 "save_every"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be {'positive' if name == 'lr' else 'at least 1'}")
    if args.init_from and args.stage not in TRAIN:
        parser.error(f"--init-from needs the stage to go on with: {', '.join(TRAIN)}")
    if args.download and args.data not in CIFAR:
        parser.error(f"--download is for --data {' and '.join(CIFAR)}")
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


def pick_precision(device):
    """The fastest that a network learns in. Some CPUs have instructions for bfloat16, others emulate it slowly; GPUs
    without it have float16."""
    if "cuda" in device:
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device != "cpu":
        return "float32"
    taken = {dtype: [] for dtype in (torch.bfloat16, torch.float32)}
    for _ in range(50):  # in turns, and the best counts: the machine may be busy with other things too
        for dtype, times in taken.items():
            x = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
    return "bfloat16" if min(taken[torch.bfloat16]) < 0.8 * min(taken[torch.float32]) else "float32"


def join_processes(args):
    """Under torchrun: finds the other processes, and takes one GPU each. Only the first may speak."""
    if "LOCAL_RANK" in os.environ:
        distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")


def lock(folder):
    """Keeps other processes out of a run's folder until this one ends, however it ends. -> what to hold on to"""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{folder} is in use by another process") from None
    return file


def begin(args, config):
    """Writes what all later commands of a run need: options, sizes and vocabulary; with --init-from, weights too."""
    args.precision = args.precision or pick_precision(args.device)
    if args.init_from:
        begun = read_options(args.init_from)
        model = Wuerstchen.load(args.init_from) if begun else Wuerstchen.from_official(args.init_from)
        if model.compressor is None:
            raise ValueError(f"{args.init_from} has no EfficientNetEncoder, which Stage B needs")
        model.config.image_size = args.image_size
        model.save(args.run)
        if (clip := Path(args.init_from) / "clip.pt").exists():
            shutil.copy(clip, args.run)
    else:
        save_config(args.run, config, train_tokenizer(args, config))
    (Path(args.run) / "options.json").write_text(json.dumps({name: getattr(args, name) for name in KEPT}) + "\n")


def main(argv=None):
    args = parse_args(argv)
    folder, begun = Path(args.run), read_options(args.run)
    defaults = KEPT
    if args.init_from:
        if not os.path.isdir(args.init_from):
            raise FileNotFoundError(f"--init-from: no run or snapshots in {args.init_from}")
        source = read_options(args.init_from) or {"preset": "v2", "image_size": None}
        defaults = KEPT | {name: source[name] for name in ("preset", "image_size")}
        if args.preset not in (None, source["preset"]):
            raise ValueError(f"the weights in {args.init_from} are of preset {source['preset']}, not {args.preset}")
    for name in KEPT:  # what a run was begun with holds for its later commands too
        given = getattr(args, name)
        if given is None:
            setattr(args, name, begun.get(name, defaults[name]))
        elif name in FIXED and given != begun.get(name, given):
            option = f"--{name.replace('_', '-')}"
            how = f"with {option} {begun[name]}" if begun[name] else f"without {option}"
            raise ValueError(f"{folder} was begun {how}; take another --run")
    if args.preset not in PRESETS:
        raise ValueError(f"unknown preset {args.preset!r}; there are {', '.join(PRESETS)}")
    if not begun and args.stage in TRAIN and not args.init_from:
        raise FileNotFoundError(f"no run in {folder}: train it first: python train.py --run {folder}")
    config = copy.deepcopy(PRESETS[args.preset])
    config.text_b, config.b.text_width = config.text, config.text.width  # one contrastive training for both stages
    config.image_size = args.image_size = args.image_size or config.image_size
    if args.image_size < 1 or args.image_size % config.stride:
        raise ValueError(f"--image-size must be a multiple of {config.stride} for {args.preset}, not {args.image_size}")
    args.cache = args.cache or CACHE[args.preset]
    args.device = pick_device(args.device)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if args.download:
        args.data_dir = args.data_dir or "data"
    join_processes(args)

    start = time.time()
    if rank() == 0:
        held = lock(folder)  # noqa: F841, until main returns
        if args.download:
            _, archive, md5, *_ = CIFAR[args.data]
            if not (path := Path(args.data_dir) / archive).exists():
                download(CIFAR_URL + archive, path, md5)
        if args.stage == "tokenizer" or not begun:
            begin(args, config)
    wait_for_all()
    args.precision = args.precision or read_options(folder).get("precision", "float32")
    run = Run(args)
    for stage in TRAIN if args.stage == "all" else [args.stage] if args.stage in TRAIN else []:
        if args.stage == "all" and (folder / f"{stage}.pt").exists():
            print(f"stage {stage}: finished before")
            continue
        given = args.init_from is not None and (folder / f"{stage}.pt").exists()
        torch.manual_seed(args.seed)  # a stage comes out the same alone and as part of `all`
        run.take(Wuerstchen.load(folder, NEEDS[stage] + (stage,) * given).to(args.device), given)
        TRAIN[stage](run)
        if rank() == 0:
            finish(run, stage)
        wait_for_all()
    run.report()
    print(f"{folder}: done in {time.time() - start:.0f} s")
    if distributed.is_initialized():
        distributed.destroy_process_group()


def finish(run, stage):
    """Puts a finished stage into its place, and away what belonged to the one before."""
    for name in OUTDATED[stage]:
        path = run.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    run.model.save_stage(run.folder, stage)
    (run.folder / f"{stage}.ckpt").unlink(missing_ok=True)
    later = [name for name in TRAIN if stage in NEEDS[name] and (run.folder / f"{name}.pt").exists()]
    if later:
        print(f"stage {stage} is new, but {' and '.join(later)} learned from the one before; to train again: "
              + "; ".join(f"python train.py {name} --run {run.folder}" for name in later))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {(str(error).strip() or repr(error)).splitlines()[-1]}")  # after a worker process's traceback
    except KeyboardInterrupt:  # between the training loops, which save first
        print("stopped: the same command goes on", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if ranks() == 1 or "onnection" not in str(error):
            raise
        sys.exit(f"error: process {rank()} lost another one ({why(error)}); the same command goes on from the last "
                 "checkpoint")
