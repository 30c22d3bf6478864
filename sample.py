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
for rounding). Everything that draws is in wuerstchen.py; the scores are in score.py.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import score
from train import make_sheet, pick_device, to_picture
from wuerstchen import FAST_TIMES, Wuerstchen


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
    add("--cfg", "guidance of Stage C; 1: none", type=float, default=4.0)
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
        sheet = (score.score if args.score else score.sweep)(model, args, draw)
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


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
