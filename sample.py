"""
Draws pictures with a trained run:

    python sample.py "a big red circle to the left of a small blue square"
    python sample.py "a red star" "a green cross above a pink circle" --count 4 --seed 7 --out grid.png
    python sample.py "a photo of a fox" --official DIR    with the published weights, from a copy of their snapshots
    python sample.py --reconstruct photo.png          what Stage A (4x smaller) and Stage B (42x smaller) keep of it
    python sample.py --score                          how often a run on Shapes draws what the caption says

The same seed draws the same picture. At the end of this file, the checker: it reads a picture of Shapes, pixels only,
and says which attributes of a caption it shows.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

from train import (BACKGROUNDS, COLOURS, OUTLINES, RELATIONS, SIZES, Shapes, make_sheet, parse, pick_device,
                   read_options, to_picture)
from wuerstchen import FAST_TIMES, Wuerstchen


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw pictures from captions with a trained Würstchen.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw; several make a grid")
    add("--run", default="runs/tiny", help="folder of the run, as train.py left it")
    add("--out", default="out.png", help="PNG to write")
    add("--count", type=int, default=1, help="pictures of each prompt")
    add("--seed", type=int, default=0, help="of the noise")
    add("--negative", default="", help="what to keep away from")
    add("--height", type=int, help="in pixels (default: as trained)")
    add("--width", type=int, help="in pixels (default: as trained)")
    add("--official", metavar="DIR", help="draw with the published weights: a folder with the hub's snapshots "
        "wuerstchen-prior, wuerstchen and, for --reconstruct, EfficientNetEncoder")
    add("--low-memory", action="store_true", help="with --official: read each network when it is needed, then drop it")
    add("--timesteps", default="default", choices=("default", "fast"),
        help="of Stage C; fast: the authors' list of 29 steps instead of --steps-c")
    add("--steps-c", type=int, default=60, help="diffusion steps of Stage C")
    add("--steps-b", type=int, default=12, help="diffusion steps of Stage B")
    add("--cfg", type=float, default=4.0, help="guidance of Stage C; 1: none")
    add("--cfg-b", type=float, default=1.0, help="guidance of Stage B; 1: none")
    add("--sampler", default="ddpm", choices=("ddpm", "ddim"), help="ddim adds no noise on the way")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--reconstruct", nargs="+", metavar="IMAGE", help="pictures to compress and bring back, instead of drawing")
    add("--score", action="store_true", help="draw 200 ordinary and 200 held-out Shapes captions and check them")
    args = parser.parse_args(argv)
    if not (args.prompts or args.reconstruct or args.score):
        parser.error("nothing to draw: give a PROMPT, --reconstruct or --score")
    if args.low_memory and not args.official:
        parser.error("--low-memory is for --official: a run of one's own is small")
    for name in ("count", "steps_c", "steps_b", "height", "width"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def load_model(args):
    """The run's networks, or the published ones, on the device asked for."""
    device = pick_device(args.device)
    if args.official:
        # Half precision where memory is what counts; bfloat16 because CPUs have no fast float16.
        half = torch.float16 if device == "cuda" else torch.bfloat16 if args.low_memory else torch.float32
        return Wuerstchen.from_official(args.official, device, half, args.low_memory)
    stages = ("text", "a", "b") if args.reconstruct else ("text", "a", "b", "c")
    return Wuerstchen.load(args.run, stages).to(device)


def draw_prompts(model, args, prompts, quiet=False):
    """Pictures of prompts, drawn in batches of at most 800,000 pixels. -> (N, H, W, 3) in [0, 1]"""
    side, images = model.config.image_size, []
    batch = max(1, 800_000 // ((args.height or side) * (args.width or side)))
    for start in range(0, len(prompts), batch):
        images.append(model.generate(
            prompts[start:start + batch], args.negative, args.height, args.width,
            FAST_TIMES if args.timesteps == "fast" else args.steps_c, args.cfg, args.steps_b, args.cfg_b,
            args.seed + start, args.sampler,
            lambda steps, stage: tqdm(steps, desc=f"stage {stage.upper()}", unit="step", disable=quiet)))
    return torch.cat(images).cpu()


def read_image(path, size):
    """A picture file, turned upright, its middle cut out and scaled to `size` -> (size, size, 3) in [0, 1]"""
    try:
        with Image.open(path) as image:
            image = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"can't read {path} as a picture: {error}") from None
    return torch.from_numpy(np.array(image)) / 255


def score(model, args, count=200):
    """Prints how many attributes, and whole captions, the checker finds in drawn pictures, for captions that were never
    trained on: ordinary ones, and ones with a colour-shape pair that was held out."""
    attributes = ("colour", "shape", "size", "relation", "background", "count")
    print("captions  " + "".join(f"{name:>12}" for name in (*attributes, "whole")))
    for split, name in (("test", "ordinary"), ("heldout", "held-out")):
        data = Shapes(model.config.image_size, seed=1, split=split)
        captions = [data.caption(i) for i in range(count)]
        images = (draw_prompts(model, args, captions) * 255).round().byte().numpy()
        answers = [check(image, caption) for image, caption in zip(images, captions)]
        found = [np.mean([truth for answer in answers for truth in answer[key]]) for key in attributes]
        print(f"{name:10}" + "".join(f"{share:12.1%}" for share in (*found, np.mean([whole(a) for a in answers]))))


def main(argv=None):
    args = parse_args(argv)
    if args.score and (args.official or read_options(args.run).get("data", "shapes") != "shapes"):
        raise ValueError(f"--score needs a run trained on Shapes; {args.official or args.run} wasn't")
    model = load_model(args)
    start = time.time()
    if args.score:
        score(model, args)
        print(f"{time.time() - start:.0f} s")
        return
    if args.reconstruct:
        images = torch.stack([read_image(path, model.config.image_size) for path in args.reconstruct])
        rows = [images, *model.reconstruct(images.to(model.device), seed=args.seed,
                                           progress=lambda steps, stage: tqdm(steps, desc="stage B", unit="step"))]
        sheet = make_sheet([row.cpu() for row in rows], [Path(path).name for path in args.reconstruct])
    else:
        if any(not prompt.strip() for prompt in args.prompts):
            raise ValueError("a prompt is empty")
        images = draw_prompts(model, args, [prompt for prompt in args.prompts for _ in range(args.count)])
        height, width = images.shape[1:3]
        if (height, width) != (args.height or height, args.width or width):
            print(f"drawn at {height}x{width}, the nearest size to {args.height or height}x{args.width or width} that "
                  "the stages can draw")
        if len(images) == 1:
            sheet = to_picture(images[0])
        else:  # a row a prompt, or one row of prompts
            sheet = make_sheet(images.split(args.count)) if args.count > 1 else make_sheet([images], args.prompts)
    sheet.save(args.out)
    print(f"wrote {args.out}")


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
