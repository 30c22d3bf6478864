"""
Draws pictures with a trained run:

    python sample.py "a big red circle to the left of a small blue square"
    python sample.py "a red star" "a green cross above a pink circle" --count 4 --seed 7 --out grid.png
    python sample.py "a photo of a fox" --official DIR    with the published weights, from a copy of their snapshots
    python sample.py "a red star" --film film.gif         and how it appears
    python sample.py --reconstruct photo.png              what Stage A (4x smaller) and Stage B (42x smaller) keep of it
    python sample.py --vary photo.png                     the same semantic latents, drawn anew by Stage B
    python sample.py --mix a.png b.png                    a strip of pictures from one to the other
    python sample.py --redraw photo.png "a red star" --strength 0.6
    python sample.py --fill photo.png mask.png "a red star"      draws only where the mask is white
    python sample.py --score                              what the run is worth, in numbers
    python sample.py --sweep                              how they move with guidance and steps

Pictures are numbered row by row, and picture i has the seed --seed + i: with that seed it comes out the same alone (but
for rounding). Read as far as `main` to see how pictures are drawn; after it come the scores, formulas first, and the
checker of Shapes, which reads a picture, pixels only, and says which attributes of a caption it shows.
"""

import argparse
import copy
import json
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

from train import (BACKGROUNDS, COLOURS, KEPT, OUTLINES, RELATIONS, SIZES, Batches, make_sheet, open_data, parse,
                   pick_device, read_options, to_picture)
from wuerstchen import CLIP, FAST_TIMES, Wuerstchen, codebook_usage


def times(text):
    return FAST_TIMES if text == "fast" else [float(t) for t in text.split(",")]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw pictures from captions with a trained Würstchen.")

    def add(name, help, to=parser, **options):
        to.add_argument(name, help=help + (" (default: %(default)s)" if options.get("default") else ""), **options)

    add("prompts", "what to draw; several make a grid", nargs="*", metavar="PROMPT")
    add("--run", "folder of the run, as train.py left it", default="runs/tiny")
    add("--out", "PNG to write", default="out.png")
    add("--count", "pictures of each prompt (default: 1; of --vary 4, of --mix 7)", type=int)
    add("--seed", "of the first picture's noise; the second has the next, and so on (default: 0)", type=int, default=0)
    add("--negative", "what to keep away from", default="")
    add("--height", "in pixels (default: as trained)", type=int)
    add("--width", "in pixels (default: as trained)", type=int)
    add("--official", "draw with the published weights: a folder with the hub's snapshots wuerstchen-prior, wuerstchen "
        "and, where a picture is given, EfficientNetEncoder", metavar="DIR")
    add("--low-memory", "with --official: read each network when it is needed, then drop it", action="store_true")
    add("--timesteps", "of Stage C instead of --steps-c: falling times from 1 to 0, as 1,0.8,0.5,0; fast: the authors' "
        "list of 29 steps", type=times, metavar="TIMES")
    add("--steps-c", "diffusion steps of Stage C", type=int, default=60)
    add("--steps-b", "diffusion steps of Stage B", type=int, default=12)
    add("--cfg", "guidance of Stage C; 1: none (default: 2; with --official 4, the authors')", type=float)
    add("--cfg-b", "guidance of Stage B; 1: none", type=float, default=1.0)
    add("--sampler", "ddim adds no noise on the way", default="ddpm", choices=("ddpm", "ddim"))
    add("--device", "where to compute", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    ways = parser.add_mutually_exclusive_group()
    add("--film", "also write how the pictures appear, as an animated GIF", ways, metavar="GIF")
    add("--reconstruct", "pictures to compress and bring back: originals, by Stage A alone, by B and A", ways,
        nargs="+", metavar="IMAGE")
    add("--vary", "draw a picture's semantic latents again, with new noise in Stage B", ways, metavar="IMAGE")
    add("--mix", "a strip from one picture's semantic latents to another's", ways, nargs=2, metavar="IMAGE")
    add("--redraw", "draw the prompts, beginning with this picture and noise", ways, metavar="IMAGE")
    add("--fill", "draw the prompts where the mask is white, and leave the rest of the picture", ways, nargs=2,
        metavar=("IMAGE", "MASK"))
    add("--strength", "of --redraw's noise: 0 leaves the picture, 1 nothing of it", type=float, default=0.6)
    add("--score", "a table of what the run is worth; in its folder's score.json too", ways, action="store_true")
    add("--sweep", "the same for several settings of guidance and steps, and a picture of them (see --score)", ways,
        action="store_true")
    add("--score-count", "pictures in each row of --score and --sweep", type=int, default=200)
    add("--inception", "TorchScript file of the network for the Fréchet distance (default: the run's image tower)",
        metavar="FILE")
    args = parser.parse_args(argv)
    if not args.prompts and (args.redraw or args.fill):
        parser.error(f"{'--redraw' if args.redraw else '--fill'} needs a PROMPT")
    if not (args.prompts or args.reconstruct or args.vary or args.mix or args.score or args.sweep):
        parser.error("nothing to draw: give a PROMPT, a picture or --score")
    if any(not prompt.strip() for prompt in args.prompts):
        parser.error("a prompt is empty")
    if args.low_memory and not args.official:
        parser.error("--low-memory is for --official: a run of one's own is small")
    if args.official and (args.score or args.sweep):
        parser.error("--score and --sweep need a run of one's own, with its test pictures")
    for path in filter(None, (args.out, args.film)):  # not after minutes of drawing
        if not Path(path).absolute().parent.is_dir() or Path(path).suffix.lower() not in Image.registered_extensions():
            parser.error(f"no such folder, or no kind of picture: {path}")
    if args.cfg is None:  # on Shapes, more of it bends the shapes
        args.cfg = 4.0 if args.official else 2.0
    if args.count is None:
        args.count = 7 if args.mix else 4 if args.vary else 1
    for name, least in dict(count=1, steps_c=1, steps_b=1, height=1, width=1, score_count=2).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return args


def load_model(args):
    """The run's networks, or the published ones, on the device asked for."""
    device = pick_device(args.device)
    if args.official:
        # Half precision where memory is what counts; bfloat16 because CPUs have no fast float16.
        half = torch.float16 if device == "cuda" else torch.bfloat16 if args.low_memory else torch.float32
        return Wuerstchen.from_official(args.official, device, half, args.low_memory)
    stages = ("text", "a", "b") if args.reconstruct or args.vary or args.mix else ("text", "a", "b", "c")
    return Wuerstchen.load(args.run, stages).to(device)


def options(args, quiet=False):
    """What all ways of drawing are told."""
    return dict(negative=args.negative, steps_c=args.timesteps or args.steps_c, guidance_c=args.cfg,
                steps_b=args.steps_b, guidance_b=args.cfg_b, sampler=args.sampler,
                progress=lambda steps, stage: tqdm(steps, f"stage {stage.upper()}", unit="step", disable=quiet))


def read_image(path, height, width, mode="RGB"):
    """A picture file, turned upright, its middle cut out and scaled -> (height, width, 3) in [0, 1]; a mask, mode "L"
    -> (height, width). ValueError if it can't be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert(mode)
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"can't read {path} as a picture: {error}") from None
    return torch.from_numpy(np.array(image)) / 255


def read_mask(path, picture, height, width):
    """Where a mask is white -> bool (height, width). ValueError unless it has some, and is as large as its picture."""
    mask = read_image(path, height, width, "L") > 0.5
    with Image.open(path) as a, Image.open(picture) as b:
        if ImageOps.exif_transpose(a).size != ImageOps.exif_transpose(b).size:
            raise ValueError(f"the mask {path} must be as large as the picture {picture}")
    if not mask.any():
        raise ValueError(f"the mask {path} has no white: there is nothing to fill")
    return mask


def draw(model, args, prompts, quiet=False):
    """Pictures of prompts, each with a seed of its own, in batches of at most 800,000 pixels: drawn from nothing, or
    from the picture that the command names. -> (N, H, W, 3) in [0, 1]"""
    size = [given or model.config.image_size for given in (args.height, args.width)]
    path = args.vary or args.redraw or args.fill and args.fill[0]
    image = read_image(path, *size).to(model.device) if path else None
    mask = read_mask(args.fill[1], path, *size).to(model.device) if args.fill else None
    batch, drawn = max(1, 800_000 // (size[0] * size[1])), []
    for start in range(0, len(prompts), batch):
        some = prompts[start:start + batch]
        how = dict(seed=[args.seed + start + i for i in range(len(some))], **options(args, quiet))
        if args.vary:
            drawn.append(model.vary(torch.stack([image] * len(some)), some, **how))
        elif args.redraw:
            drawn.append(model.redraw(torch.stack([image] * len(some)), some, args.strength, **how))
        elif args.fill:
            drawn.append(model.fill(torch.stack([image] * len(some)), torch.stack([mask] * len(some)), some, **how))
        else:
            drawn.append(model.generate(some, height=args.height, width=args.width, **how))
    return torch.cat(drawn).cpu()


def to_sheet(images, args):
    """The one picture alone, else a row a prompt, or one row of prompts -> PIL image"""
    if len(images) == 1:
        return to_picture(images[0])
    return make_sheet(images.split(args.count)) if args.count > 1 else make_sheet([images], args.prompts or None)


def main(argv=None):
    args = parse_args(argv)
    model, start = load_model(args), time.time()
    prompts = [prompt for prompt in args.prompts or [""] for _ in range(args.count)]
    size = [given or model.config.image_size for given in (args.height, args.width)]
    if args.score or args.sweep:
        sheet = (score if args.score else sweep)(model, args)
        print(f"{time.time() - start:.0f} s")
        if args.score:
            return
    elif args.reconstruct:
        images = torch.stack([read_image(path, *size) for path in args.reconstruct])
        rows = model.reconstruct(images.to(model.device), seed=[args.seed + i for i in range(len(images))],
                                 **options(args))
        sheet = make_sheet([images, *(row.cpu() for row in rows)], [Path(path).name for path in args.reconstruct])
    elif args.mix:
        images = torch.stack([read_image(path, *size) for path in args.mix]).to(model.device)
        sheet = to_sheet(model.mix(images, args.count, prompts[0], args.seed, **options(args)).cpu(), args)
    elif args.film:
        frames = model.film(prompts, [args.seed + i for i in range(len(prompts))], height=args.height,
                            width=args.width, **options(args))
        first, *others = sheets = [to_sheet(frame.cpu(), args) for frame in frames]
        first.save(args.film, save_all=True, append_images=others, loop=0,
                   duration=[80] * (len(sheets) - 1) + [2000])  # milliseconds
        print(f"wrote {args.film}")
        sheet = sheets[-1]
    else:
        images = draw(model, args, prompts)
        if list(images.shape[1:3]) != size:
            print(f"drawn at {images.shape[1]}x{images.shape[2]}, the nearest size to {size[0]}x{size[1]} that the "
                  "stages can draw")
        sheet = to_sheet(images, args)
    sheet.save(args.out)
    print(f"wrote {args.out}")


# ----------------------------------------------------------------------------------------------------------------------
# Scores. Formulas first; pictures are (N, H, W, 3) in [0, 1].


def psnr(pictures, others):
    """Peak signal to noise in dB of each pair of pictures -> (N,)"""
    return -10 * (pictures - others).square().mean(dim=(1, 2, 3)).log10()


def ssim(pictures, others):
    """Structural similarity of each pair of pictures, at least 11 px wide and high (Wang et al., 2004): a Gaussian
    window of 11 pixels, sigma 1.5, where it lies wholly in the picture; K1 0.01, K2 0.03; mean over channels -> (N,)"""
    window = torch.exp(-(torch.arange(11, device=pictures.device) - 5.0) ** 2 / (2 * 1.5 ** 2))
    window = window / window.sum()

    def blur(x):
        return F.conv2d(F.conv2d(x, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    x, y = (p.movedim(-1, 1).flatten(0, 1)[:, None].float() for p in (pictures, others))  # every channel a picture
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, both = blur(x * x) - mean_x ** 2, blur(y * y) - mean_y ** 2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2))
    return similar.view(len(pictures), -1).mean(dim=1)


def frechet(x, y):
    """Fréchet distance between two sets of features, seen as two normal distributions: |difference of means|² +
    trace(S1 + S2 - 2·(S1·S2)^½) (Heusel et al., 2017). It falls with the number of pictures: compare equal numbers
    only. x (N, F), y (M, F) -> float"""
    x, y = x.double().cpu(), y.double().cpu()
    s1, s2 = torch.cov(x.T).view(x.shape[1], -1), torch.cov(y.T).view(x.shape[1], -1)
    # S1·S2 has the eigenvalues of the symmetric S1^½·S2·S1^½. For few pictures many are 0, or by rounding below.
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(dim=0) - y.mean(dim=0)).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def wilson(right, count):
    """95 % confidence interval of a share, `right` of `count` (Wilson, 1927) -> (low, high)"""
    z, share = 1.959964, right / count
    middle = (share + z ** 2 / (2 * count)) / (1 + z ** 2 / count)
    half = z / (1 + z ** 2 / count) * (share * (1 - share) / count + z ** 2 / (4 * count ** 2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


# ----------------------------------------------------------------------------------------------------------------------
# The judge and the two commands.

ATTRIBUTES = ("colour", "shape", "size", "relation", "background", "count")


def check_all(images, captions):
    """The checker's shares over drawn pictures (N, H, W, 3) -> {attribute: share, "whole": share,
    "whole_95": (low, high)}"""
    pictures = (images * 255).round().byte().cpu().numpy()
    answers = [check(picture, caption) for picture, caption in zip(pictures, captions)]
    truths = {key: [truth for answer in answers for truth in answer[key]] for key in ATTRIBUTES}
    shares = {key: float(np.mean(found)) for key, found in truths.items() if found}
    right = sum(map(whole, answers))
    return shares | {"whole": right / len(captions), "whole_95": wilson(right, len(captions))}


def inception(path, device):
    """The features of an Inception network that was saved as TorchScript, as StyleGAN's inception-2015-12-05.pt: it is
    called with pictures (N, 3, H, W) uint8 and return_features=True -> function of images (N, H, W, 3) in [0, 1].
    ValueError if the file is something else."""
    try:
        network = torch.jit.load(path, map_location=device).eval()
        network.forward.schema  # an ordinary checkpoint of tensors has none
    except (RuntimeError, ValueError, OSError, AttributeError):
        raise ValueError(f"can't read {path} as a TorchScript file") from None
    return lambda images: network((images * 255).round().byte().permute(0, 3, 1, 2), return_features=True)


class Judge:
    """What drawn pictures are held against: the run's own test pictures, and its contrastive model if it kept it."""

    def __init__(self, model, args):
        options = KEPT | read_options(args.run) | {"image_size": model.config.image_size}
        self.model, self.count = model, args.score_count
        self.data = lambda split: open_data(Namespace(**options), split)
        self.shapes = options["data"] == "shapes"
        path, self.clip = Path(args.run) / "clip.pt", None
        if path.exists():
            self.clip = CLIP(model.config).to(model.device).eval()
            self.clip.load_state_dict(torch.load(path, map_location=model.device, weights_only=True))
        self.features = inception(args.inception, model.device) if args.inception else self.clip and self.tower
        self.features_of = Path(args.inception).name if args.inception else "the run's image tower"

    def tower(self, images):
        """images (N, H, W, 3) in [0, 1] -> features of the run's image tower, one mean a picture (N, features)"""
        return self.clip.image_features(images).mean(dim=1)

    def clip_score(self, images, captions):
        """100 times the cosine between pictures and their captions, 0 where it is negative (Hessel et al., 2021)
        -> (N,)"""
        ids, mask = (x.to(images.device) for x in self.model.tokenizer(captions))
        cosine = self.clip(images, ids, mask).diag() / self.clip.logit_scale.exp().clamp(max=100)
        return 100 * cosine.clamp(min=0)

    def examples(self, split, batch=0):
        """Batch number `batch` of `count` test pictures -> images (N, H, W, 3) in [0, 1], N captions"""
        pictures, captions, _ = next(iter(Batches(self.data(split), self.count, batch, batch + 1, 0, 1)))
        return pictures / 255, captions

    def by(self, function, *of):
        """A function of pictures (and captions), called on 32 at a time -> its results, joined"""
        parts = [function(*(x[i:i + 32].to(self.model.device) if torch.is_tensor(x) else x[i:i + 32] for x in of))
                 for i in range(0, len(of[0]), 32)]
        return torch.cat(parts).float().cpu()

    @torch.no_grad()
    def __call__(self, images, captions, real):
        """What can be said of drawn pictures, given the captions and as many real ones -> {name: number}"""
        numbers = check_all(images, captions) if self.shapes else {}
        if self.clip:
            numbers["clip_score"] = self.by(self.clip_score, images, captions).mean().item()
        if self.features:
            numbers["frechet"] = frechet(self.by(self.features, images), self.by(self.features, real))
        return numbers


def percent(share):
    return f"{share:.1%}"


# What tables show of a row's numbers: title and format.
COLUMNS = {**{name: (name, percent) for name in (*ATTRIBUTES, "whole")},
           "whole_95": ("95 %", lambda ends: " to ".join(map(percent, ends))),
           "clip_score": ("CLIP", "{:.1f}".format), "frechet": ("Fréchet", "{:.2f}".format),
           "psnr": ("PSNR", "{:.1f}".format), "ssim": ("SSIM", "{:.3f}".format)}


def print_table(title, rows):
    """rows: {name: {column: number}}; a column that no row has is left out"""
    columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
    widths = [18 if column == "whole_95" else max(8, len(COLUMNS[column][0]) + 2) for column in columns]

    def line(name, cells):
        print(f"{name!s:22}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))

    line(title, [COLUMNS[column][0] for column in columns])
    for name, row in rows.items():
        line(name, [COLUMNS[column][1](row[column]) if column in row else "" for column in columns])


def finish(judge, args, name, numbers):
    """What there is to say under the tables; keeps the numbers in the run's folder."""
    print(f"{judge.count} pictures each, captions and pictures never trained on.")
    if judge.clip:
        print("CLIP: 100 times the cosine between picture and caption, by the run's own contrastive model.")
    if judge.features:
        print(f"Fréchet: distance to {judge.count} other pictures of the data set, in the features of "
              f"{judge.features_of}; it depends on their number.")
    if not judge.clip:
        print(f"No {'CLIP score' if judge.features else 'CLIP score and Fréchet distance'}: {args.run} has no clip.pt "
              "(python train.py text makes it).")
    path = Path(args.run) / name
    settings = {key: getattr(args, key) for key in ("seed", "steps_c", "timesteps", "cfg", "steps_b", "cfg_b",
                                                    "sampler", "negative", "inception")}
    path.write_text(json.dumps(dict(pictures=judge.count, settings=settings, **numbers), indent=1) + "\n")
    print(f"wrote {path}")


@torch.no_grad()
def score(model, args):
    """Prints what a run is worth, on captions and pictures that it was never trained on, and keeps it in its folder's
    score.json."""
    judge, rows = Judge(model, args), {}
    for name, split in {"drawn": "test", "drawn, held-out pairs": "heldout"}.items():
        if split == "test" or judge.shapes:
            captions, real = judge.examples(split)[1], judge.examples(split, batch=1)[0]
            rows[name] = judge(draw(model, args, captions, quiet=True), captions, real)

    def rebuild(images, seed, captions=None):
        return model.vary(images, captions, seed=seed, steps_b=args.steps_b, guidance_b=args.cfg_b,
                          sampler=args.sampler)

    images, captions = judge.examples("test")
    real, seeds = judge.examples("test", batch=1)[0], range(args.seed, args.seed + judge.count)
    for name, pictures in {"rebuilt by B and A": judge.by(rebuild, images, seeds),
                           "same, B told captions": judge.by(rebuild, images, seeds, captions),
                           "rebuilt by A": judge.by(lambda x: model.a(x)[0].clamp(0, 1), images)}.items():
        rows[name] = judge(pictures, captions, real) | {"psnr": psnr(pictures, images).mean().item(),
                                                        "ssim": ssim(pictures, images).mean().item()}
    rows["the pictures"] = judge(images, captions, real)
    codes = judge.by(lambda x: model.a(x)[2], images).long()
    usage, perplexity = codebook_usage(codes, model.config.a.codebook_size)
    print_table("", rows)
    print(f"Codebook: {usage:.1%} in use, perplexity {perplexity:.0f} of {model.config.a.codebook_size}.")
    finish(judge, args, "score.json", dict(rows=rows, codebook=dict(usage=usage, perplexity=perplexity)))


SWEEP = {"cfg": ("guidance of C", (1, 2, 4, 7, 10)), "steps_c": ("steps of C", (5, 10, 20, 30, 60)),
         "steps_b": ("steps of B", (2, 4, 8, 12, 20))}


def sweep(model, args):
    """Prints how the figures move with one setting at a time, keeps them in the run's sweep.json, and draws one caption
    with each guidance (across) and number of Stage C's steps (down), all from one seed -> PIL image"""
    judge, tables = Judge(model, args), {}
    captions, real = judge.examples("test")[1], judge.examples("test", batch=1)[0]

    def drawn(prompts, **settings):
        changed = copy.copy(args)
        vars(changed).update(settings, **({"timesteps": None} if "steps_c" in settings else {}))
        return draw(model, changed, prompts, quiet=True)

    for name, (title, values) in SWEEP.items():
        tables[name] = {value: judge(drawn(captions, **{name: value}), captions, real) for value in values}
        print_table(title, tables[name])
        print()
    finish(judge, args, "sweep.json", tables)
    prompt, (_, guidances), (_, steps) = (args.prompts or captions)[0], SWEEP["cfg"], SWEEP["steps_c"]
    rows = [torch.cat([drawn([prompt], cfg=cfg, steps_c=n) for cfg in guidances]) for n in steps]
    for i, n in enumerate(steps):  # in front of each row, a white picture that names it
        label = Image.new("RGB", rows[i].shape[2:0:-1], "white")
        ImageDraw.Draw(label).text((4, label.height // 2), f"{n} steps of C", "black")
        rows[i] = torch.cat([torch.from_numpy(np.array(label))[None] / 255, rows[i]])
    return make_sheet(rows, [prompt, *(f"guidance {cfg}" for cfg in guidances)])


# ----------------------------------------------------------------------------------------------------------------------
# The checker of Shapes.

GRID = 128          # every picture is brought to this side first: all lengths below are in its pixels
MIN_AREA = 60       # smaller blobs are specks, not objects (the smallest object, a small star, has 170)
MAX_DISTANCE = 70   # RGB distance beyond which a colour is none of ours
MIN_OVERLAP = 0.75  # intersection over union below which a shape is none of ours; a good drawing has 0.86 to 1
BIG_RADIUS = GRID * (SIZES["small"][1] + SIZES["big"][0]) / 2  # midway


@dataclass
class Blob:
    colour: str    # or None
    shape: str     # or None
    size: str
    centre: tuple  # (x, y) of the bounding box, in pixels of the grid


def nearest(rgb, palette):
    """The name of the palette's colour nearest to rgb, or None if it is far from all."""
    distance = {name: np.linalg.norm(np.subtract(rgb, colour)) for name, colour in palette.items()}
    name = min(distance, key=distance.get)
    return name if distance[name] < MAX_DISTANCE else None


def paint(pixels, background):
    """Which colour every pixel is painted with: ints (GRID, GRID), 0 for background, else 1 + its place in COLOURS.

    A pixel on an object's edge is a mix of its colour and the background. Seen
    from the background the mix lies in the colour's direction, only nearer, so
    directions tell colours apart on soft edges too, where distances would not.
    """
    towards = np.array(list(COLOURS.values()), np.float32) - background
    length = np.maximum(np.linalg.norm(towards, axis=1), 80)  # at least 80: a background may be of one of our colours
    along = (pixels - background) @ (towards / length[:, None]).T
    kind = along.argmax(axis=-1)
    more_than_half = along.max(axis=-1) > 0.5 * length[kind]
    return np.where(more_than_half, kind + 1, 0)


def components(kind):
    """Label connected pixels of one kind alike: ints like kind, 0 where kind is 0."""
    label = np.where(kind > 0, np.arange(1, kind.size + 1).reshape(kind.shape), 0)
    down, right = kind[1:] == kind[:-1], kind[:, 1:] == kind[:, :-1]
    while True:
        before = label.copy()
        for a, b, same in ((label[1:], label[:-1], down), (label[:, 1:], label[:, :-1], right)):
            np.minimum(a, b, out=a, where=same)
            np.minimum(a, b, out=b, where=same)
        # A label is also the place of a pixel: taking over that pixel's label
        # doubles the way labels travel in each round.
        label = np.append(0, label)[label]
        if (label == before).all():
            return label


def normalised(mask):
    """A bool mask moved and scaled to one centre and one area, in a picture (32, 32): floats 0..1.

    Centre of mass and area hardly change when a picture is so soft that a star
    loses its tips; its bounding box would.
    """
    ys, xs = np.nonzero(mask)
    x, y, half = xs.mean() + 0.5, ys.mean() + 0.5, len(xs) ** 0.5
    window = Image.fromarray(np.float32(mask)).transform(
        (32, 32), Image.Transform.EXTENT, (x - half, y - half, x + half, y + half), Image.Resampling.BILINEAR)
    return np.asarray(window)


def templates():
    """(shape, normalised mask, area for radius 1) of each shape, once sharp and once with its points softened."""
    found = []
    for shape, outline in OUTLINES.items():
        canvas = Image.new("L", (240, 240))
        ImageDraw.Draw(canvas).polygon((100 * outline + 120).ravel().tolist(), fill=255)
        for softness in (0, 15):
            mask = np.array(canvas.filter(ImageFilter.GaussianBlur(softness))) > 127
            found.append((shape, normalised(mask), mask.sum() / 100 ** 2))
    return found


TEMPLATES = templates()


def find_blobs(pixels, background):
    """The objects of a picture (GRID, GRID, 3), largest first."""
    kind = np.pad(paint(pixels, background), 1)
    # Start from cores, pixels with at least six of their eight neighbours of their
    # kind, and grow them over the rest: objects that touch stay two, and a rim
    # that compression has coloured differently goes to its object.
    core, inner = np.zeros_like(kind), kind[1:-1, 1:-1]
    alike = sum(np.int8(kind[y:y + GRID, x:x + GRID] == inner) for y in range(3) for x in range(3))
    core[1:-1, 1:-1] = np.where(alike >= 7, inner, 0)
    seed = components(core)
    label = seed.copy()
    for _ in range(6):  # enough for the tips of a star
        spread = np.zeros_like(label)
        spread[1:-1, 1:-1] = np.max([label[:-2, 1:-1], label[2:, 1:-1], label[1:-1, :-2], label[1:-1, 2:]], axis=0)
        label = np.where((label == 0) & (kind > 0), spread, label)
    blobs = []
    names, areas = np.unique(label[label > 0], return_counts=True)
    for i in areas.argsort()[::-1]:
        if areas[i] < MIN_AREA:
            break
        mask = label == names[i]
        form = normalised(mask)
        overlap, shape, unit = max((np.minimum(form, t).sum() / np.maximum(form, t).sum(), shape, unit)
                                   for shape, t, unit in TEMPLATES)
        ys, xs = np.nonzero(mask)
        blobs.append(Blob(
            colour=nearest(np.median(pixels[seed[1:-1, 1:-1] == names[i]], axis=0), COLOURS),
            shape=shape if overlap > MIN_OVERLAP else None,
            size="big" if (areas[i] / unit) ** 0.5 > BIG_RADIUS else "small",
            centre=((xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2)))
    return blobs


def check(image, caption):
    """What a picture shows of its caption: {"colour": [True, False], "shape": [...], ...}.

    image: uint8 array (side, side, 3). The answer lists one truth for every
    attribute that the caption names, under "colour", "shape", "size",
    "relation" and "background", and one under "count": whether there are
    exactly as many objects as named. The picture is right if all are true.
    Raises ValueError for a caption outside the grammar.
    """
    scene = parse(caption)
    pixels = np.asarray(Image.fromarray(image).resize((GRID, GRID), Image.BILINEAR), np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    blobs = find_blobs(pixels, background)

    def agreement(thing, blob):
        size, colour, shape = thing
        truths = {"colour": blob is not None and blob.colour == colour,
                  "shape": blob is not None and blob.shape == shape}
        return truths | ({"size": blob is not None and blob.size == size} if size else {})

    # Give each named object the blob that makes most of the caption true; None where there are too few.
    choices = blobs[:4] + [None] * (len(scene.objects) - len(blobs))
    chosen = max(permutations(choices, len(scene.objects)),
                 key=lambda some: sum(sum(agreement(*pair).values()) for pair in zip(scene.objects, some)))
    answer = {"colour": [], "shape": [], "size": [], "relation": [], "background": [],
              "count": [len(blobs) == len(scene.objects)]}
    for pair in zip(scene.objects, chosen):
        for attribute, truth in agreement(*pair).items():
            answer[attribute].append(truth)
    if scene.relation:
        answer["relation"].append(None not in chosen and related(chosen[0].centre, chosen[1].centre, scene.relation))
    if scene.background:
        answer["background"].append(nearest(background, BACKGROUNDS) == scene.background)
    return answer


def related(first, second, relation):
    """Whether the way from the second centre to the first leads mostly in the relation's direction."""
    dx, dy = np.subtract(first, second)
    step_x, step_y = RELATIONS[relation]
    along, across = (dx * step_x, dy) if step_x else (dy * step_y, dx)
    return bool(along > abs(across))


def whole(answer):
    return all(all(truths) for truths in answer.values())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
