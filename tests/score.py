"""
Measures how good a trained run is, on captions and images that it was not trained on:

    python tests/score.py --run runs/tiny                  a table, also added to the run's report.md; the same numbers
                                                           in score.json in the run folder
    python tests/score.py --run runs/tiny --count 500
    python tests/score.py --run runs/tiny --sweep --out sweep.png "a red star"

--sweep varies the guidance scale of Stage C and the numbers of steps, one at a time, and prints a table for each. It
also writes sweep.json (the same numbers), a plot (for Shapes only) and a grid of images (guidance scale x steps of C).
Below: formulas; the checker of Shapes, which looks only at the pixels and says which attributes of a caption an image
has; Judge, which computes a row of a table; the two commands.
"""

import argparse
import json
import re
import sys
from collections import namedtuple
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))
from sample import DEVICES, make_sheet, number, pick_device  # noqa: E402
from train import (BACKGROUNDS, COLOURS, OUTLINES, RELATIONS, SIZES, Scene, examples, open_data, plot,  # noqa: E402
                   read_options)
from wuerstchen import CLIP, Wuerstchen  # noqa: E402


def psnr(images, originals):
    """Peak signal-to-noise ratio in dB. Both (N, H, W, 3) in [0, 1] -> (N,)"""
    return -10 * (images - originals).square().mean(dim=(1, 2, 3)).log10()


def frechet(x, y):
    """Fréchet distance between features x (N, F) and y (M, F) of two sets of images, each treated as a normal
    distribution: |difference of means|² + trace(S1 + S2 - 2·(S1·S2)^½) with the covariances S1 and S2 (Heusel et al.,
    2017). It becomes smaller with more images, so compare only distances for the same N and M."""
    x, y = x.cpu().double(), y.cpu().double()
    s1, s2 = torch.cov(x.T).view(x.shape[1], -1), torch.cov(y.T).view(x.shape[1], -1)
    cross = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()  # rounding can make zero eigenvalues negative or complex
    return ((x.mean(dim=0) - y.mean(dim=0)).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def codebook_usage(codes, codebook_size):
    """Share of the codebook in use, and the codes' perplexity (1: always one code; codebook_size: all equally often).
    codes: any shape of int64 -> (float in [0, 1], float >= 1)"""
    share = torch.bincount(codes.flatten(), minlength=codebook_size) / codes.numel()
    perplexity = torch.special.entr(share).sum().exp()
    return (share > 0).float().mean().item(), perplexity.item()


def wilson(right, count):
    """95% confidence interval of the share right / count (Wilson, 1927) -> (low, high)"""
    z, share = 1.959964, right / count
    middle = (share + z ** 2 / (2 * count)) / (1 + z ** 2 / count)
    half = z / (1 + z ** 2 / count) * (share * (1 - share) / count + z ** 2 / (4 * count ** 2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


# ----------------------------------------------------------------------------------------------------------------------
# The checker of Shapes.

GRID = 128          # each image is first resized to GRID x GRID; all lengths below are in these pixels
MIN_AREA = 60       # smaller blobs are specks, not objects (the smallest object, a small star, has 170 pixels)
MAX_DISTANCE = 70   # RGB distance above which a colour is none of ours
MIN_OVERLAP = 0.75  # intersection over union below which a shape is none of ours; rendered ones have 0.86 to 1
BIG_RADIUS = GRID * (SIZES["small"][1] + SIZES["big"][0]) / 2  # halfway between small and big
ATTRIBUTES = ("colour", "shape", "size", "relation", "background", "count")
# An object in an image; centre: of its bounding box. Blob() stands for a missing one: None makes every attribute wrong,
# and nan every relation.
Blob = namedtuple("Blob", "colour shape size centre", defaults=(None, None, None, (float("nan"),) * 2))


def nearest(rgb, palette):
    """The name of the palette's colour nearest to rgb, or None if all are far away."""
    distance = {name: np.linalg.norm(np.subtract(rgb, colour)) for name, colour in palette.items()}
    name = min(distance, key=distance.get)
    return name if distance[name] < MAX_DISTANCE else None


def paint(pixels, background):
    """The colour of each pixel: pixels (GRID, GRID, 3), background (3,) -> ints (GRID, GRID), 0 for the background or
    1 + index in COLOURS. A pixel on the edge of an object is a mixture of its colour and the background. Seen from the
    background, it lies in the same direction as the colour, only nearer. So we compare directions, not distances."""
    directions = np.array(list(COLOURS.values()), np.float32) - background
    length = np.maximum(np.linalg.norm(directions, axis=1), 80)  # not near 0 even if the background is one of COLOURS
    projection = (pixels - background) @ (directions / length[:, None]).T
    colour = projection.argmax(axis=-1)
    return np.where(projection.max(axis=-1) > 0.5 * length[colour], colour + 1, 0)


def components(colours):
    """Connected components: colours (H, W) -> labels (H, W), the same label for connected pixels of one colour, 0 where
    the colour is 0. Each pixel starts with its own label; then the smallest label spreads."""
    labels, before = np.where(colours > 0, np.arange(1, colours.size + 1).reshape(colours.shape), 0), None
    while not np.array_equal(labels, before):
        before = labels.copy()
        for label, colour in ((labels, colours), (labels.T, colours.T)):  # vertical neighbours, then horizontal ones
            a, b, same = label[1:], label[:-1], colour[1:] == colour[:-1]
            np.minimum(a, b, out=a, where=same)
            np.minimum(a, b, out=b, where=same)
        # Label k started at pixel k - 1. Take the label which that pixel has now: this saves many rounds.
        labels = np.append(0, labels)[labels]
    return labels


def normalised(mask):
    """A bool mask moved and scaled to a fixed centre of mass and area -> floats (32, 32) in [0, 1]. (Not to a fixed
    bounding box: blur removes the points of a star, which changes the box much more.)"""
    ys, xs = np.nonzero(mask)
    x, y, half = xs.mean() + 0.5, ys.mean() + 0.5, len(xs) ** 0.5
    return np.asarray(Image.fromarray(np.float32(mask)).transform(
        (32, 32), Image.Transform.EXTENT, (x - half, y - half, x + half, y + half), Image.Resampling.BILINEAR))


OUTLINE_MASKS = []  # (shape, normalised mask, area for radius 1) of each shape, once sharp and once blurred
for shape, outline in OUTLINES.items():
    canvas = Image.new("L", (240, 240))
    ImageDraw.Draw(canvas).polygon((100 * outline + 120).ravel().tolist(), fill=255)
    for radius in (0, 15):
        mask = np.array(canvas.filter(ImageFilter.GaussianBlur(radius))) > 127
        OUTLINE_MASKS.append((shape, normalised(mask), mask.sum() / 100 ** 2))


def find_blobs(pixels, background):
    """The objects in an image, largest first: pixels (GRID, GRID, 3), background (3,) -> list of Blob"""
    # Start with the cores of objects: pixels with at least 6 neighbours of their colour. Then grow the cores over the
    # other coloured pixels. So objects that touch stay separate, and an edge in another colour belongs to its object.
    colours = np.pad(paint(pixels, background), 1)
    inner = colours[1:-1, 1:-1]
    same = sum(np.int8(colours[y:y + GRID, x:x + GRID] == inner) for y in range(3) for x in range(3))  # counts itself
    cores = labels = components(np.pad(np.where(same >= 7, inner, 0), 1))
    for _ in range(6):  # enough for the points of a star
        neighbours = labels[:-2, 1:-1], labels[2:, 1:-1], labels[1:-1, :-2], labels[1:-1, 2:]
        labels = np.where((labels == 0) & (colours > 0), np.pad(np.max(neighbours, axis=0), 1), labels)
    blobs = []
    names, areas = np.unique(labels[labels > 0], return_counts=True)
    for i in areas.argsort()[::-1][:np.sum(areas >= MIN_AREA)]:
        mask = labels == names[i]
        form = normalised(mask)
        overlap, shape, unit = max((np.minimum(form, template).sum() / np.maximum(form, template).sum(), shape, unit)
                                   for shape, template, unit in OUTLINE_MASKS)
        colour = nearest(np.median(pixels[cores[1:-1, 1:-1] == names[i]], axis=0), COLOURS)
        size = "big" if (areas[i] / unit) ** 0.5 > BIG_RADIUS else "small"
        ys, xs = np.nonzero(mask)
        centre = (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2
        blobs.append(Blob(colour, shape if overlap > MIN_OVERLAP else None, size, centre))
    return blobs


THING = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(OUTLINES)})"
GRAMMAR = re.compile(rf"{THING}(?: ({'|'.join(RELATIONS)}) {THING})?(?: on a ({'|'.join(BACKGROUNDS)}) background)?")


def parse(caption):
    """The Scene that a caption describes. ValueError for a caption outside the grammar."""
    found = GRAMMAR.fullmatch(caption)
    if not found:
        raise ValueError(f"not a Shapes caption: {caption!r}")
    *first, relation, size, colour, shape, background = found.groups()
    scene = Scene([tuple(first)] + ([(size, colour, shape)] if relation else []), relation, background)
    if scene.caption() != caption or relation and first[1:] == [colour, shape]:  # "a orange circle"; an object twice
        raise ValueError(f"not a Shapes caption: {caption!r}")
    return scene


def check(image, caption):
    """Which attributes of a caption an image has: uint8 array (size, size, 3) -> {"colour": [True, False], ...}, with
    one bool for each time that the caption names the attribute. "count" has one bool: whether there are exactly as many
    objects as the caption names. ValueError if Shapes has no such caption."""
    scene = parse(caption)
    pixels = np.asarray(Image.fromarray(image).resize((GRID, GRID), Image.BILINEAR), np.float32)
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    blobs = find_blobs(pixels, background)

    def compare(chosen):
        return {name: [getattr(blob, name) == named[i] for named, blob in zip(scene.objects, chosen) if named[i]]
                for i, name in enumerate(("size", "colour", "shape"))}

    # Of all ways to assign blobs to the named objects, take the one that makes most of the caption right.
    candidates = blobs[:4] + [Blob()] * (len(scene.objects) - len(blobs))
    chosen = max(permutations(candidates, len(scene.objects)), key=lambda some: sum(map(sum, compare(some).values())))
    answer = compare(chosen) | {"relation": [], "background": [], "count": [len(blobs) == len(scene.objects)]}
    if scene.relation:  # right if the vector from the second centre to the first points mostly in its direction
        vector, direction = np.subtract(chosen[0].centre, chosen[1].centre), np.array(RELATIONS[scene.relation])
        answer["relation"].append(bool(vector @ direction > abs(vector @ direction[::-1])))
    if scene.background:
        answer["background"].append(nearest(background, BACKGROUNDS) == scene.background)
    return answer


def whole(answer):
    """Whether everything in an answer of `check` is right -> bool"""
    return all(all(bools) for bools in answer.values())


def check_all(images, captions):
    """The checker's answers as shares: images (N, H, W, 3) in [0, 1], N captions -> {attribute: share that is right,
    "whole": share of images where everything is right, "95%": its confidence interval}"""
    answers = [check(x, caption) for x, caption in zip((images * 255).round().byte().cpu().numpy(), captions)]
    bools = {name: [right for answer in answers for right in answer[name]] for name in ATTRIBUTES}
    right = sum(map(whole, answers))
    return {name: float(np.mean(found)) for name, found in bools.items() if found} | {
        "whole": right / len(captions), "95%": wilson(right, len(captions))}


def in_batches(function, *inputs, size=32):
    """Calls a function with `size` items of each input at a time -> its results, joined"""
    return torch.cat([function(*(x[i:i + size] for x in inputs)) for i in range(0, len(inputs[0]), size)])


def generate(model, captions, args, **changes):
    """Generates an image for each caption, with the settings in args, changed by `changes`; image i has the seed
    args.seed + i. A batch has at most 800,000 pixels, or one image, to limit memory use. -> (N, H, W, 3) in [0, 1]"""
    args = argparse.Namespace(**vars(args) | changes)
    steps, guidance = (args.steps_c, args.steps_b), (args.cfg, args.cfg_b)
    seeds, size = range(args.seed, args.seed + len(captions)), max(1, 800_000 // model.config.image_size ** 2)
    return in_batches(lambda some, seeds: model.generate(some, steps=steps, guidance=guidance, seed=list(seeds)),
                      captions, seeds, size=size)


class Judge:
    """Computes a row of a table, with the run's test images and, if the run has it, its CLIP model."""

    def __init__(self, model, args):
        self.model, self.count, self.clip, self.features = model, args.count, None, None
        self.options = read_options(args.run) | {"image_size": model.config.image_size}
        self.shapes, self.data = self.options["data"] == "shapes", open_data(argparse.Namespace(**self.options))
        if (path := Path(args.run) / "clip.pt").exists():
            self.clip = CLIP(model.config).to(model.device).eval()
            self.clip.load_state_dict(torch.load(path, map_location=model.device, weights_only=True))
            self.features = lambda x: self.clip.image_features(x).mean(dim=1)  # mean of the 9 parts of an image
        if args.inception:
            network = torch.jit.load(args.inception, map_location=model.device).eval()
            self.features = lambda x: network((x * 255).round().byte().permute(0, 3, 1, 2), return_features=True)

    def examples(self, split, batch=0):
        """Batch number `batch` of a split -> images (count, H, W, 3) in [0, 1], list of captions"""
        images, captions = examples(self.data[split], self.count, batch * self.count)
        return images.to(self.model.device), captions

    def __call__(self, images, captions, real):
        """Images that were made for these captions, real images for the Fréchet distance -> {column: number}"""
        numbers = check_all(images, captions) if self.shapes else {}
        if self.clip:
            tokens = (x.to(images.device) for x in self.model.tokenizer(captions))
            image, text = in_batches(self.clip.embed_images, images), in_batches(self.clip.embed_text, *tokens)
            numbers["CLIP"] = 100 * (image * text).sum(dim=-1).clamp(min=0).mean().item()  # Hessel et al., 2021
        if self.features:
            numbers["Fréchet"] = frechet(in_batches(self.features, images), in_batches(self.features, real))
        return numbers


# The columns of a table, and how their numbers are printed.
COLUMNS = dict.fromkeys((*ATTRIBUTES, "whole"), "{:.1%}") | {
    "95%": "{0[0]:.1%} to {0[1]:.1%}", "CLIP": "{:.1f}", "Fréchet": "{:.2f}", "PSNR": "{:.1f}"}
SWEEP = {"cfg": (0, 1, 2, 4, 8, 16), "steps_c": (1, 2, 4, 8, 16, 60), "steps_b": (1, 2, 4, 8, 12, 20)}


def print_table(title, rows):
    """rows: {name: {column: number}}. Columns that no row has are left out. Returns what it prints."""
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    table = [[title, *columns]]
    for key, row in rows.items():
        table.append([str(key), *(COLUMNS[name].format(row[name]) if name in row else "" for name in columns)])
    widths = [max(map(len, column)) + 2 for column in zip(*table)]
    text = "\n".join(name.ljust(widths[0]) + "".join(cell.rjust(width) for cell, width in zip(cells, widths[1:]))
                     for name, *cells in table)
    print(text)
    return text


def finish(judge, args, file_name, numbers):
    """Prints what the columns mean, and writes the numbers to a file in the run folder."""
    print(f"{judge.count} images per row (Fréchet depends on this number), made from test captions" +
          (", which were never used in training." if judge.shapes else
           " of the data set; if it has fewer, they are used again."))
    print("CLIP: 100 times the cosine between image and caption, by the run's own CLIP model." if judge.clip else
          f"No CLIP score: {args.run} has no clip.pt (python train.py text writes it).")
    if judge.features:
        print(f"Fréchet: distance to as many other test images, in features of {args.inception or 'that CLIP model'}.")
    path = Path(args.run) / file_name
    path.write_text(json.dumps({"settings": vars(args)} | numbers, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {path}")


def score(model, args):
    """Prints a table for a run, appends it to report.md, and writes its numbers to score.json."""
    judge, rows = Judge(model, args), {}
    for name, split in {"generated": "test", "generated, held-out pairs": "heldout"}.items():
        if split == "test" or judge.shapes:
            captions, real = judge.examples(split)[1], judge.examples(split, batch=1)[0]
            rows[name] = judge(generate(model, captions, args), captions, real)

    def by_b(images, seeds, captions):
        return model.reconstruct(images, captions, list(seeds), steps=args.steps_b, guidance=args.cfg_b)[1]

    (images, captions), (real, _) = judge.examples("test"), judge.examples("test", batch=1)
    seeds = range(args.seed, args.seed + judge.count)
    for name, reconstructed in {"reconstructed by B and A": in_batches(by_b, images, seeds, [""] * judge.count),
                          "same, B given the captions": in_batches(by_b, images, seeds, captions),
                          "reconstructed by A": in_batches(lambda x: model.a(x)[0].clamp(0, 1), images)}.items():
        rows[name] = judge(reconstructed, captions, real) | {"PSNR": psnr(reconstructed, images).mean().item()}
    rows["the images"] = judge(images, captions, real)
    codes = in_batches(lambda x: model.a.quantizer(model.a.encode(x))[1], images)
    usage, perplexity = codebook_usage(codes, model.config.a.codebook_size)
    text = print_table("", rows)
    if (report := Path(args.run) / "report.md").exists():  # train.py begins it
        with open(report, "a", encoding="utf-8") as file:
            file.write(f"\n{judge.count} images per row:\n\n```\n{text}\n```\n")
    print(f"Codebook: {usage:.1%} in use, perplexity {perplexity:.0f} of {model.config.a.codebook_size}.")
    finish(judge, args, "score.json", {"rows": rows, "codebook": {"usage": usage, "perplexity": perplexity}})


def sweep(model, args):
    """Generates an image of the prompt with each guidance scale (columns) and number of steps of Stage C (rows),
    always with the same seed, and writes this grid to args.out. Then prints a table for each setting, and writes all
    tables to sweep.json."""
    judge, tables, grid = Judge(model, args), {}, []
    captions, real = judge.examples("test")[1], judge.examples("test", batch=1)[0]
    prompt = args.prompt or captions[0]
    for steps in SWEEP["steps_c"]:
        row = torch.cat([generate(model, [prompt], args, cfg=cfg, steps_c=steps) for cfg in SWEEP["cfg"]]).cpu()
        label = Image.new("RGB", (row.shape[2], row.shape[1]), "white")  # a white image at the start of the row
        ImageDraw.Draw(label).text((4, label.height // 2), f"{steps} steps of C", "black", font_size=12)
        grid.append(torch.cat([torch.from_numpy(np.array(label))[None] / 255, row]))
    make_sheet(grid, [prompt, *(f"guidance {cfg}" for cfg in SWEEP["cfg"])]).save(args.out)
    print(f"wrote {args.out}")
    for name, values in SWEEP.items():
        tables[name] = {value: judge(generate(model, captions, args, **{name: value}), captions, real)
                        for value in values}
        print_table(name, tables[name])
    if judge.shapes:
        curves = {name: [(value, 100 * row["whole"]) for value, row in table.items()] for name, table in tables.items()}
        path = Path(args.out).with_suffix(".plot.png")
        plot(curves, "guidance scale, or steps", "captions fully correct, %", circles=curves).save(path)
        print(f"wrote {path}")
    finish(judge, args, "sweep.json", tables)


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure how good a trained run is.")
    add = parser.add_argument
    add("prompt", nargs="?", help="what the grid of --sweep shows (default: the first test caption)")
    add("--run", default="runs/tiny", help="run folder (default: runs/tiny)")
    add("--count", type=number(int, 2, 10**6), default=200, help="images per row of a table (default: 200)")
    add("--seed", type=int, default=0, help="seed of the first image; each further image adds 1 (default: 0)")
    add("--steps-c", type=number(int, 1, 10_000), help="steps of Stage C (default: the run's)")
    add("--steps-b", type=number(int, 1, 10_000), help="steps of Stage B (default: the run's)")
    add("--cfg", type=float, help="guidance scale of Stage C; 1: none (default: the run's)")
    add("--cfg-b", type=float, help="guidance scale of Stage B; 1: none (default: the run's)")
    add("--inception", metavar="FILE", help="for Fréchet: TorchScript file, such as StyleGAN's inception-2015-12-05.pt")
    add("--device", default="auto", choices=DEVICES)
    add("--sweep", action="store_true", help="vary Stage C's guidance scale and the numbers of steps, one at a time")
    add("--out", default="sweep.png", help="image file for the grid of --sweep (default: sweep.png)")
    args = parser.parse_args(argv)
    model = Wuerstchen.load(args.run).to(pick_device(args.device))
    (sweep if args.sweep else score)(model, args)


if __name__ == "__main__":
    main()
