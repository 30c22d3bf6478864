"""
Generates images with a trained model:

    python sample.py "a big red circle to the left of a small blue square"
    python sample.py "a red star" "a green cross above a pink circle" --count 4 --seed 7 --out grid.png
    python sample.py "a photo of a fox" --official DIR    with the published weights, from a copy of their snapshots
    python sample.py "a red star" --film film.gif         and an animation of Stage C's steps
    python sample.py --reconstruct photo.png              by A (latents 4x smaller per side), and by B and A (42x)
    python sample.py --vary photo.png                     the image's semantic latents, decoded by B with new noise
    python sample.py --mix a.png b.png                    interpolates between the semantic latents of two images
    python sample.py --redraw photo.png "a red star" --strength 0.6
    python sample.py --fill photo.png mask.png "a red star"      generates only where the mask is white

Generated images are numbered row by row from 0. Image i has the seed --seed + i, and is the same (up to rounding) when
generated alone with that seed. With --mix, all have the seed --seed.
"""

import argparse
import functools
import io
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from tokenizer import UserError
from wuerstchen import Wuerstchen, add_noise, generators, latent_size_of, normal_noise

# ----------------------------------------------------------------------------------------------------------------------
# Images in and out. train.py uses these too.


def load_image(file, size, background="white"):
    """An image file's path, or its pixels as a uint8 array -> PIL image in RGB of size (height, width): upright,
    transparent parts filled with `background`, scaled and centre-cropped. OSError if it can't be read."""
    try:
        image = Image.fromarray(file) if isinstance(file, np.ndarray) else Image.open(file)
        image.draft("RGB", (2 * size[1], 2 * size[0]))  # a large JPEG need not be decoded in full
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: convert() would clip, not scale
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
        return ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.BICUBIC)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise OSError(f"can't read {'an array' if isinstance(file, np.ndarray) else file}: {error}") from error


def load_mask(image, mask, size):
    """The files of an image and its mask -> (H, W) bool, True where the mask is white; transparency counts as black"""
    white = to_tensor(load_image(mask, size, "black")).mean(dim=-1) > 0.5
    (w, h), (mask_w, mask_h) = (ImageOps.exif_transpose(Image.open(file)).size for file in (image, mask))
    if abs(w * mask_h - h * mask_w) > max(w, h):
        raise UserError(f"{mask} and {image} differ in aspect ratio: {mask_w}x{mask_h} and {w}x{h} pixels")
    return white


def to_tensor(image):
    """PIL image -> (H, W, 3) in [0, 1]"""
    return torch.from_numpy(np.array(image)) / 255


def to_pil(image):
    """(H, W, 3) in [0, 1] -> PIL image"""
    return Image.fromarray((image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy())


def make_sheet(rows, captions=(), gap=4):
    """A PIL image of rows of images; captions go under the last row. rows: list of (N, H, W, 3) in [0, 1]; captions:
    at most N strings"""
    count, height, width, _ = rows[0].shape
    lines = [textwrap.wrap(caption, width // 6) for caption in captions]
    text_height = max((14 * len(one) + 2 for one in lines), default=0)
    sheet = Image.new("RGB", (count * (width + gap) + gap, len(rows) * (height + gap) + gap + text_height), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(to_pil(image), (gap + x * (width + gap), gap + y * (height + gap)))
    for x, caption in enumerate(lines):
        ImageDraw.Draw(sheet).multiline_text((gap + x * (width + gap), len(rows) * (height + gap) + gap),
                                             "\n".join(caption), "black", font_size=12, spacing=2)
    return sheet


DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name=None):
    """Returns the named device; for "auto" and None, the best one available. name: one of DEVICES, or None. Raises
    UserError if the named device is not available."""
    found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name in (None, "auto"):
        return found[0]
    if name not in found:
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds no such device; --device cpu works")
    return name


def print_machine(device, precision):
    """Prints a line that says what the script runs on, and returns that line."""
    name = f"{device} ({torch.cuda.get_device_name()})" if device == "cuda" else device
    print(line := f"PyTorch {torch.__version__} on {name}, {precision}, CPU threads: {torch.get_num_threads()}")
    return line


# ----------------------------------------------------------------------------------------------------------------------
# What else the three stages can do. model: Wuerstchen; images (B, H, W, 3) in [0, 1], sides multiples of
# `model.config.stride`; prompts: one per image; seed: as in `Wuerstchen.generate`. Each returns images in this form,
# except `film`: a list of such batches.


@torch.no_grad()
def mix(model, images, prompt="", count=7, seed=0, **options):
    """Decodes `count` images from semantic latents interpolated between those of two images, all with the same noise.
    images (2, H, W, 3), seed: int -> (count, H, W, 3); the first and the last are reconstructions of the two"""
    first, last = model.compress(images)
    between = torch.lerp(first, last, torch.linspace(0, 1, count, device=model.device).view(-1, 1, 1, 1))
    return model.from_semantic(between, [prompt] * count, latent_size_of(images),
                               generator=generators([seed] * count, count), **options)


@torch.no_grad()
def redraw(model, images, prompts, strength=0.6, steps=(None, None), guidance=(None, None), seed=None, **options):
    """Changes images to fit prompts: Stage C starts from their semantic latents, noised to time `strength` (SDEdit,
    Meng et al., 2022). At 0, Stage C is skipped, as in `reconstruct`; at 1, the image is ignored, as in `generate`."""
    generator, semantic = generators(seed, len(images)), model.compress(images)
    if strength > 0:
        times = model.times(steps[0], "c")
        times = torch.cat([times.new_tensor([strength]), times[times < strength]])
        x = normal_noise(semantic.shape, generator, model.device)
        if strength < 1:
            x = add_noise(model.c.normalise(semantic), x, times[:1])
        semantic = model.sample_c(x, times, prompts, guidance=guidance[0], generator=generator, **options)
    return model.from_semantic(semantic, prompts, latent_size_of(images), steps=steps[1], guidance=guidance[1],
                               generator=generator, **options)


def keep(known, mask, noise):
    """Returns a function for `after_step` of `sample`. Where `mask` (B, h, w, 1) is True, it resets x to `known`,
    noised to the time reached, so nothing is generated there. (In the `masks` of `fill`, True means the opposite.) This
    is the idea of RePaint (Lugmayr et al., 2022), without its resampling."""
    def after_step(x, x0, t_next):
        return torch.where(mask, add_noise(known, noise, t_next.view(1)) if t_next > 0 else known, x)
    return after_step


@torch.no_grad()
def fill(model, images, masks, prompts, steps=(None, None), guidance=(None, None), seed=None, **options):
    """Generates the masked parts of images anew; Stage A reconstructs the rest, from unquantized latents. masks
    (B, H, W) bool, True for pixels to generate; a cell or latent is generated if any of its pixels is masked. prompts
    describe whole images."""
    if model.config.b.token_width:
        raise UserError("--fill needs a Stage B that works on latents, not on codes (--tokens)")
    options["generator"] = generators(seed, len(images))
    semantic, latents = model.c.normalise(model.compress(images)), model.a.encode(images) / model.a.scale
    kept_c, kept_b = (F.adaptive_max_pool2d(masks[:, None].float().cpu(), x.shape[1:3]).movedim(1, -1).to(x.device) == 0
                      for x in (semantic, latents))
    noise = normal_noise(semantic.shape, options["generator"], model.device)
    semantic = model.sample_c(noise, model.times(steps[0], "c"), prompts, guidance=guidance[0],
                              after_step=keep(semantic, kept_c, noise), **options)
    noise = normal_noise(latents.shape, options["generator"], model.device)
    latents = model.sample_b(noise, model.times(steps[1], "b"), semantic, prompts, guidance=guidance[1],
                             after_step=keep(latents, kept_b, noise), **options)
    return model.a.decode(latents).float().clamp(0, 1)


@torch.no_grad()
def film(model, prompts, seeds, size=None, steps=(None, None), guidance=(None, None), **options):
    """How images emerge: Stage C's estimate of x0 at each of its steps, decoded by Stage B in 4 steps with the noise of
    the final image. seeds: one int per image; size (height, width)
    -> list of (B, H, W, 3), one per frame; the last is what `generate` returns"""
    semantic_size, latent_size = model.config.grid(*(size or [model.config.image_size] * 2))
    generator, estimates = generators(seeds, len(prompts)), []

    def remember(x, x0, t_next):
        estimates.append(model.c.denormalise(x0))
        return x

    x = normal_noise((len(prompts), *semantic_size, model.config.semantic_channels), generator, model.device)
    semantic = model.sample_c(x, model.times(steps[0], "c"), prompts, guidance=guidance[0], generator=generator,
                              after_step=remember, **options)
    frames = [(x0, 4) for x0 in estimates] + [(semantic, steps[1])]
    return [model.from_semantic(x0, prompts, latent_size, steps=n, guidance=guidance[1],
                                generator=[one.clone_state() for one in generator], **options)
            for x0, n in tqdm(frames, "film", unit="frame")]


# ----------------------------------------------------------------------------------------------------------------------
# The command line.


EXAMPLE = Path(__file__).parent / "tests/shapes"  # a trained run


def number(kind, low, high):
    """For argparse: an int or a float from low to high, both included."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def image_file(path, **options):
    """For argparse: the path of an image that Pillow can write with these options."""
    try:
        kind = Image.registered_extensions()[Path(path).suffix.lower()]
        Image.new("RGB", (64, 64)).save(io.BytesIO(), kind, **options)
    except Exception as error:  # of many kinds
        raise argparse.ArgumentTypeError(f"Pillow can't write this type of file: {path}; try .png or .gif") from error
    if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"can't write {path}")
    return path


def run_script(main, stopped):
    """Runs a script. On an error that the user can fix, it prints one line; on a bug, a traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # for what the terminal can't print
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\n" + stopped)
    except Exception as error:
        no_memory = isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "allocate" in str(error)
        if no_memory or isinstance(error, (UserError, OSError)):
            sys.exit("error: " + [type(error).__name__, *str(error).splitlines()][-1])
        raise


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Generate images from captions with a trained Würstchen.")
    add = parser.add_argument
    add("prompts", help="captions to generate images for; several images make one sheet", nargs="*", metavar="PROMPT")
    add("--run", help="folder of the run (default: the one that comes with the code)", default=EXAMPLE)
    add("--official", help="use the published weights in this folder: the Hugging Face snapshots wuerstchen-prior, "
        "wuerstchen and, if you give an image, EfficientNetEncoder", metavar="DIR")
    add("--out", help="image file to write (default: %(default)s)", type=image_file, default="out.png")
    add("--count", help="images per prompt (default: 1; --vary: 4; --mix: 7 frames)", type=number(int, 1, 10_000))
    add("--seed", help="seed of the first image; each further image adds 1 (default: 0)", default=0,
        type=number(int, 0, 2**63 - 1))
    add("--negative", help="negative prompt", default="")
    add("--height", help="in pixels (default: as in training)", type=number(int, 1, 8192))
    add("--width", help="in pixels (default: as in training)", type=number(int, 1, 8192))
    add("--steps-c", help="diffusion steps of Stage C (default: the run's)", type=number(int, 1, 10_000))
    add("--fast", help="the authors' list of 29 steps for Stage C", action="store_true")
    add("--steps-b", help="diffusion steps of Stage B (default: the run's)", type=number(int, 1, 10_000))
    add("--cfg", help="classifier-free guidance scale of Stage C; 1 means no guidance (default: the run's)",
        type=number(float, 0, 100))
    add("--cfg-b", help="guidance scale of Stage B (default: the run's)", type=number(float, 0, 100))
    add("--sampler", help="ddim adds no noise between steps (default: ddpm)", default="ddpm", choices=("ddpm", "ddim"))
    add("--device", help="default: auto, the best available", choices=DEVICES)
    add("--strength", help="how much noise --redraw adds: 0 only reconstructs the image, 1 ignores it (default: 0.6)",
        default=0.6, type=number(float, 0, 1))
    add = parser.add_mutually_exclusive_group().add_argument
    add("--film", help="also write an animated GIF that shows how the images emerge", metavar="GIF",
        type=functools.partial(image_file, save_all=True))
    add("--reconstruct", help="images to compress and reconstruct (give a PROMPT before them)", nargs="+",
        metavar="IMAGE")
    add("--vary", help="decode an image's semantic latents with new noise in Stage B", nargs=1, metavar="IMAGE")
    add("--mix", help="interpolate between the semantic latents of two images", nargs=2, metavar="IMAGE")
    add("--redraw", help="change this image to fit the prompts", nargs=1, metavar="IMAGE")
    add("--fill", help="generate the image anew where the mask is white, to fit the prompts", nargs=2,
        metavar=("IMAGE", "MASK"))
    args = parser.parse_args(argv)
    if not (args.prompts or args.reconstruct or args.vary or args.mix):
        parser.error("nothing to generate: give a PROMPT")
    if (args.reconstruct or args.mix) and len(args.prompts) > 1:
        parser.error("--reconstruct and --mix take one PROMPT at most")
    args.count = args.count or (7 if args.mix else 4 if args.vary else 1)
    return args


def main(argv=None):
    args = parse_args(argv)
    device, dtype = pick_device(args.device), torch.float32
    if args.official:
        dtype = torch.float16 if device == "cuda" else torch.float32  # half the memory
        model = Wuerstchen.from_official(args.official, device, dtype)
    else:
        without_c = args.reconstruct or args.vary or args.mix
        model = Wuerstchen.load(args.run, ("text", "a", "b") if without_c else ("text", "a", "b", "c")).to(device)
        print(f"generating with {args.run}" + ", which comes with the code" * (args.run == EXAMPLE))
    print_machine(device, str(dtype).removeprefix("torch."))
    with torch.autocast(device, torch.float16, enabled=dtype == torch.float16):
        sheet = generate(model, args)
    try:
        sheet.save(args.out)
    except Exception as error:  # the format may not allow a sheet this large
        print(f"can't write {args.out}: {error}", file=sys.stderr)
        args.out += ".png"
        sheet.save(args.out)
    print(f"wrote {args.out}" + f" and {args.film}" * bool(args.film))


def generate(model, args):
    """What the command asks for -> PIL image"""
    for prompt in (*args.prompts, args.negative):
        if rest := model.tokenizer.overflow(prompt):
            print(f'the text encoder reads only {model.tokenizer.length} tokens; left out: "{rest}"')
        if words := model.tokenizer.unseen(prompt):
            print("never seen in training:", ", ".join(dict.fromkeys(words)))
    size = [args.height or model.config.image_size, args.width or model.config.image_size]
    prompts = [prompt for prompt in args.prompts or [""] for _ in range(args.count)]
    if args.reconstruct:
        prompts = prompts[:1] * len(args.reconstruct)
    seeds = [args.seed + i for i in range(len(prompts))]
    options = dict(negative=args.negative, steps=("fast" if args.fast else args.steps_c, args.steps_b),
                   guidance=(args.cfg, args.cfg_b), sampler=args.sampler)
    b_options = options | dict(steps=args.steps_b, guidance=args.cfg_b)
    paths = args.reconstruct or args.mix or args.vary or args.redraw or (args.fill or [])[:1]
    given = torch.stack([to_tensor(load_image(path, size)) for path in paths]).to(model.device) if paths else None
    mask = load_mask(*args.fill, size).to(model.device) if args.fill else None
    height, width = (4 * side for side in model.config.grid(*size)[1])
    if not paths and [height, width] != size:
        print(f"generating with height {height}, width {width}: the stages can't generate every size")
    if args.reconstruct:
        return make_sheet([given, *model.reconstruct(given, prompts, seeds, **b_options)],
                          [Path(path).name for path in paths])
    if args.mix:
        return make_sheet([mix(model, given, prompts[0], count=args.count, seed=args.seed, **b_options)])
    if args.film:
        frames = [to_sheet(frame, args) for frame in film(model, prompts, seeds, size, **options)]
        frames[0].save(args.film, save_all=True, append_images=frames[1:], loop=0,
                       duration=[80] * (len(frames) - 1) + [2000])  # milliseconds
        return frames[-1]

    bar = tqdm(total=0, unit="step", disable=bool(paths), delay=0.1)

    def advance(x, x0, t_next):
        bar.update()
        return x

    def generate_batch(prompts, seeds):
        batch = given.expand(len(prompts), -1, -1, -1) if paths else None
        if args.vary or args.redraw:
            return redraw(model, batch, prompts, 0 if args.vary else args.strength, seed=seeds, **options)
        if args.fill:
            return fill(model, batch, mask.expand(len(prompts), -1, -1), prompts, seed=seeds, **options)
        bar.total += sum(len(model.times(*one)) - 1 for one in zip(options["steps"], "cb"))
        return model.generate(prompts, size=size, seed=seeds, after_step=advance, **options)

    n = max(1, 800_000 // (size[0] * size[1]))  # images that fit into memory at once
    images = torch.cat([generate_batch(prompts[i:i + n], seeds[i:i + n]) for i in range(0, len(prompts), n)])
    bar.close()
    return to_sheet(images, args)


def to_sheet(images, args):
    """A single image stays as it is; several images per prompt make one row per prompt; otherwise, all images are in
    one row, each above its prompt
    -> PIL image"""
    if len(images) == 1:
        return to_pil(images[0])
    return make_sheet(images.split(args.count)) if args.count > 1 else make_sheet([images], args.prompts)


if __name__ == "__main__":
    run_script(main, "stopped")
