"""
A tour in pictures: what each part of Würstchen computes for one caption, as a page for any browser.

    python tests/tour.py                                     with the model that comes with the code
    python tests/tour.py "a green cross" --run runs/tiny     another caption (best with two objects), another run

Writes tour/index.html, which holds all pictures, and the pictures themselves beside it.
"""

import argparse
import base64
import html
import inspect
import sys
from pathlib import Path
from unittest import mock

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

import train  # noqa: E402
import wuerstchen as w  # noqa: E402
from sample import make_sheet, run_script, to_pil, to_tensor  # noqa: E402

MODEL = HERE / "tests" / "shapes"
CAPTION = "a big red circle to the left of a small blue square"
HEAD = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Inside Würstchen</title><style>
body { font: 17px/1.5 Georgia, serif; max-width: 880px; margin: auto; padding: 0 12px; color: #222 }
h2 { margin-top: 2.2em } code { font-size: 14px } figure { margin: 1em 0 }
img { max-width: 100%; image-rendering: pixelated } figcaption { font-size: 15px; color: #555 }</style>"""


# ----------------------------------------------------------------------------------------------------------------------
# Figures: numbers as PIL images.


def colours(x, limit=None):
    """Numbers (...) -> (..., 3) in [0, 1]: red if positive, blue if negative; full colour at `limit` or at max |x|"""
    x = (x.float() / (limit or x.abs().max().clamp(min=1e-9))).clamp(-1, 1)[..., None]
    red, blue = torch.tensor([0.75, 0.1, 0.1]), torch.tensor([0.1, 0.25, 0.75])
    return 1 - x.abs() * (1 - torch.where(x > 0, red, blue))


def enlarge(images, side):
    """(N, H, W, 3), small -> (N, side, side, 3), each pixel a square"""
    return F.interpolate(images.movedim(-1, 1), (side, side)).movedim(1, -1)


def table(values, rows, columns, digits=2):
    """A PIL image of a matrix (len(rows), len(columns)), each number on its colour"""
    width, height, left, top = 48, 22, 8 + 6 * max(map(len, rows)), 20
    image = Image.new("RGB", (left + width * len(columns), top + height * len(rows)), "white")
    pen, shades = ImageDraw.Draw(image), to_pil(colours(values))
    pen.font = ImageFont.load_default(12)
    for x, column in enumerate(columns):
        pen.text((left + width * x + width // 2, 4), column[:8], "black", anchor="ma")
    for y, row in enumerate(rows):
        pen.text((left - 4, top + height * y + height // 2), row, "black", anchor="rm")
        for x, value in enumerate(values[y]):
            corner = left + width * x, top + height * y
            pen.rectangle([*corner, corner[0] + width - 2, corner[1] + height - 2], shades.getpixel((x, y)))
            pen.text((corner[0] + width // 2, corner[1] + height // 2), f"{value:.{digits}f}", "black", anchor="mm")
    return image


def marked(image, cell, count):
    """An image (H, W, 3) with a frame around one of count x count cells"""
    image, side = to_pil(image), image.shape[0] / count
    y, x = cell
    ImageDraw.Draw(image).rectangle([x * side, y * side, (x + 1) * side - 1, (y + 1) * side - 1], None, "black", 2)
    return to_tensor(image)


# ----------------------------------------------------------------------------------------------------------------------
# The stations. Each yields, per figure, a PIL image, what it shows, and the functions that compute it.


class Guide:
    """The model, the caption, and eight test images with their semantic latents."""

    def __init__(self, folder, caption):
        self.folder, self.model, self.caption = folder, w.Wuerstchen.load(folder), caption
        if self.model.config.b.token_width:
            raise w.UserError("the tour shows version 2's Stage B; this run has version 1's")
        self.known = (folder, caption) == (MODEL, CAPTION)  # then we know what the pictures show
        data = train.open_data(argparse.Namespace(**train.read_options(folder)))["test"]
        self.images, self.captions = train.examples(data, 8)
        self.semantic = self.model.compress(self.images)
        ids = self.model.tokenizer.encode(caption)[:self.model.tokenizer.length - 2]
        self.tokens = ["<start>", *(self.model.tokenizer.decode([i]) for i in ids), "<end>"]

    def by_b(self, semantic, captions=None, seed=0, **options):
        """Stages B and A, all images with the same seed. semantic (N, hs, ws, 16) -> (N, H, W, 3)"""
        return self.model.from_semantic(semantic, captions or [""] * len(semantic),
                                        generator=w.generators([seed] * len(semantic), len(semantic)), **options)


def words(guide):
    """Words to tokens to vectors"""
    caption, count = guide.caption, len(guide.tokens)
    text = guide.model.encode_text([caption], "b")[0]
    yield (table(text[:count, :12], guide.tokens, [str(i) for i in range(12)], 1),
           "Each token becomes a vector; its row shows the first twelve numbers. A token sees only itself and the "
           "tokens before it, so the end token stands for the whole caption.", w.Tokenizer.encode, w.TextEncoder)
    others = [caption, *(caption.replace(a, b) for a, b in (
        ("red", "pink"), ("red", "green"), ("circle", "star"), ("big", "small"), ("left", "right"),
        ("to the left of", "above"), ("square", "cross")) if a in caption)]
    _, mask = guide.model.tokenizer(others)
    ends = guide.model.encode_text(others, "b")[torch.arange(len(others)), mask.sum(dim=1) - 1]
    yield (table(F.cosine_similarity(ends[:, None], ends[None], dim=-1),
                 [f"{i}: {other}" for i, other in enumerate(others, 1)], [*map(str, range(1, len(others) + 1))]),
           "Cosines between the end tokens' vectors of captions that each differ from the first in one thing. Training "
           "compared a projection of these vectors with image vectors.", w.CLIP.embed_text, w.contrastive_loss)


def stage_a(guide):
    """Stage A: latents, four times smaller than the image in each direction"""
    a, images, side = guide.model.a, guide.images[:1], guide.images.shape[1]
    latents = a.encode(images)
    reconstructed, _, codes, _ = a(images)
    channels = colours(latents[0].movedim(-1, 0), 3)
    shades = torch.rand(len(a.quantizer.codebook), 3, generator=torch.Generator().manual_seed(0))
    yield (make_sheet([torch.cat([images, enlarge(channels, side), enlarge(shades[codes], side)])],
                      ["image", *(f"latent channel {i}" for i in range(len(channels))), "codes"]),
           "Stage A turns each block of 4x4 pixels into four numbers, the latents (red: positive, blue: negative). "
           "Their code is the index of the nearest codebook entry, shown as a random colour. Stage B uses the latents, "
           "not the codes.", w.VQGAN.encode, w.Quantizer)
    changed, (y, x) = latents.clone(), (n // 2 for n in latents.shape[1:3])
    changed[0, y, x, 0] += latents[..., 0].std()
    yield (make_sheet([torch.cat([images, reconstructed, 1 - 8 * (reconstructed - images).abs(),
                                  1 - 8 * (a.decode(changed) - a.decode(latents)).abs()])],
                      ["image", "reconstructed from its codes", "difference (x8)",
                       "effect of shifting one latent by one standard deviation (x8)"]),
           "Most of what is lost is at the objects' edges. One latent changes only the pixels around it.",
           w.VQGAN.decode)


def semantic(guide):
    """The semantic latents: the image in a few numbers"""
    images, e, rows, (_, n, _, channels) = guide.images, guide.semantic, [], guide.semantic.shape
    yield (make_sheet([enlarge(colours(e[i].movedim(-1, 0), 3), 48) for i in range(2)], [*map(str, range(channels))]),
           f"Two test images' semantic latents, a row each: {n}x{n} cells of {channels} channels, a column each. The "
           "compressor was trained together with Stage B.", w.SemanticCompressor, w.Wuerstchen.compress)
    for i, j, cell in ((1, 3, (0, n // 2)), (3, 1, (0, n // 2)), (6, 3, (n - 1, n // 2))):
        mixed = e[i].clone()
        mixed[cell] = e[j][cell]
        rows.append(torch.stack([marked(images[i], cell, n), marked(images[j], cell, n),
                                 *guide.by_b(torch.stack([e[i], mixed]))]))
    yield (make_sheet(rows, ["an image", "another", "decoded from the first's cells", "with the other's framed cell"]),
           "Stage B decodes an image's semantic latents without a caption, then again with one cell of another image. "
           "A cell encodes what is at its position; the cells next to it encode part of the shape's outline.",
           w.Wuerstchen.from_semantic)
    values, rows = (-3, -1.5, 0, 1.5, 3), []
    for channel in range(0, channels, max(1, channels // 4)):
        swept = e[1:2].repeat(len(values), 1, 1, 1)
        swept[..., channel] += torch.tensor(values)[:, None, None] * guide.model.c.latent_std[channel]
        rows.append(guide.by_b(swept))
    yield (make_sheet(rows, [f"{v} std. dev." for v in values]),
           "Each row shifts one channel in all cells by up to three standard deviations. A channel seldom has a "
           "meaning of its own: colour, for example, is spread over all channels.", w.StageC.denormalise)


def noise(guide):
    """Noise: what diffusion undoes"""
    model, times = guide.model, torch.linspace(0, 1, 5)
    torch.manual_seed(0)
    x0, e = model.a.encode(guide.images[:1]) / model.a.scale, model.c.normalise(guide.semantic[:1])
    latents, cells = (w.add_noise(x.expand(5, *x.shape[1:]), torch.randn(1, *x.shape[1:]), times) for x in (x0, e))
    yield (make_sheet([model.a.decode(latents * model.a.scale), guide.by_b(model.c.denormalise(cells))],
                      [f"t = {t:.2f}" for t in times]),
           "Top: noise in Stage A's latents, decoded. Bottom: noise in the semantic latents, decoded by B: always "
           "sharp, but at t = 1 a different image.", w.add_noise)
    a = w.alpha_bar(t := torch.linspace(0, 1, 101))
    curves = {"signal left": a, "weight of C's loss": 1 - a, "weight of B's loss": (1 - a) * 0.4 / (a + 0.02).sqrt()}
    yield (train.plot({name: [*zip(t.tolist(), y.tolist())] for name, y in curves.items()}, "t", ""),
           "The signal left at time t, and the weight of the error at that time. Stage C trains on uniform times (7.5% "
           "of them exactly 1); Stage B mostly on times from 0.4 to 0.9, so it seldom sees those where its weight is "
           "largest.", w.alpha_bar, w.diffusion_loss, train.stage_b_loss)


def stage_c(guide):
    """Stage C at work: from noise to semantic latents"""
    model, seen, shown, generator = guide.model, [], (1, 5, 10, 20, 40, 60), w.generators([0], 1)
    model.sample_c(w.normal_noise(guide.semantic[:1].shape, generator, "cpu"), w.timesteps(60, "cpu"), [guide.caption],
                   generator=generator, after_step=lambda x, x0, t: seen.append((x, x0)) or x)
    x, x0 = (torch.cat([seen[i - 1][j] for i in shown]) for j in (0, 1))
    yield (make_sheet([guide.by_b(model.c.denormalise(x0)), enlarge(colours(x[..., 0], 3), guide.images.shape[1])],
                      [f"step {i} of 60" for i in shown]),
           "Top: the clean semantic latents that Stage C predicts, decoded by B; at step 1, about the mean of all that "
           "fit the caption. Bottom: one channel of the noisy semantic latents.", w.predict_x0, w.ddpm_step)


def attention(guide):
    """Attention: where Stages B and C look"""
    model, weights, attend = guide.model, [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        if attn_mask is None:  # the text encoder's attention has a mask
            weights.append((q @ k.mT / q.shape[-1]**0.5).softmax(dim=-1).mean(dim=1))  # mean of all heads: (B, N, M)
        return attend(q, k, v, attn_mask)

    names, side, depth = guide.tokens, guide.semantic.shape[1], model.config.c.depth
    noisy = w.normal_noise(guide.semantic[:1].shape, generator := w.generators([0], 1), "cpu")
    with mock.patch.object(F, "scaled_dot_product_attention", spy):
        e = model.sample_c(noisy, model.times(None, "c"), [guide.caption], guidance=1, generator=generator)
        middle = weights[len(weights) // 2 // depth * depth:][:depth]
        weights.clear()
        generated = guide.by_b(e, [guide.caption], guidance=1)
    cells, places = side * side, {"left": side // 2 * side, "right": side // 2 * side + side - 1}
    read = [block[0, place, cells:cells + len(names)] for block in middle for place in places.values()]
    yield (table(torch.stack(read), [f"block {i}, {cell} cell" for i in range(1, depth + 1) for cell in places], names),
           "How much the left and the right cell of Stage C's middle row attend to each token, halfway through "
           "sampling (mean over heads; the rest of the attention goes to cells and padding). A token's vector also "
           "depends on the tokens before it." + guide.known * (
               " The left cell attends to “left of a”, the first tokens that show that the red circle is on the left."),
           w.AttnBlock)
    block = min(weights[len(weights) // 2:], key=lambda x: x.shape[1])[0]  # at the U-Net's lowest level, halfway
    grid = int((block.shape[1] - model.tokenizer.length) ** 0.5)
    places = [(grid // 2, grid // 4), (grid // 2, grid * 3 // 4)]
    rows = torch.stack([block[y * grid + x] for y, x in places])
    maps = rows[:, :grid * grid].view(2, grid, grid, 1).expand(-1, -1, -1, 3)
    maps = enlarge(1 - maps / maps.amax(dim=(1, 2, 3), keepdim=True), guide.images.shape[1])
    yield (make_sheet([torch.cat([generated, maps])],
                      ["generated", "middle of the left half", "middle of the right half"]),
           "Two positions in Stage B, and which positions of the image they attend to (darker: more), in a block at "
           "the U-Net's lowest level." + guide.known * (
               " They attend not to their own object, as one might expect, but to a few other positions."),
           w.Attention.attend)
    yield (table(rows[:, grid * grid:][:, :len(names)], ["left", "right"], names),
           "How much the same two positions attend to each token." + guide.known * (
               " Each attends to its own object's word."), w.StageB.encode_conditions)


def guidance(guide):
    """Guidance: away from the prediction without a caption"""
    columns = {"no caption": ("", 1)} | {f"guidance {s}": (guide.caption, s) for s in (1, 2, 4, 8)}
    images = [guide.model.generate([caption] * 3, seed=[0, 1, 2], guidance=(s, 1)) for caption, s in columns.values()]
    yield (make_sheet([*torch.stack(images, dim=1)], [*columns]),
           "Three seeds, a row each. Guidance pushes Stage C's prediction away from what it predicts without a "
           "caption. Shapes hardly need it; photos do, but too much of it makes them look alike.", w.guided)


def stage_b(guide):
    """Stage B at work: from noise and semantic latents to Stage A's latents"""
    model, seen, e = guide.model, [], guide.semantic[1:2]
    guide.by_b(e, steps=12, after_step=lambda x, x0, t: seen.append(x0) or x)
    shown = (1, 2, 3, 4, 6, 8, 10, 12)
    yield (make_sheet([model.a.decode(torch.cat([seen[i - 1] for i in shown]) * model.a.scale)],
                      [f"step {i} of 12" for i in shown]),
           "The clean latents that Stage B predicts, decoded by Stage A. At the first step, everything is already in "
           "place, because the semantic latents say where it is; the later steps make it sharp.",
           w.StageB.predict_eps, w.sample)
    given, captions = torch.cat([e, e, 0 * e, 0 * e]), [guide.captions[1], "", guide.captions[1], ""]
    yield (make_sheet([guide.by_b(given, captions, seed) for seed in range(2)],
                      ["both", "without the caption", "without the semantic latents", "with neither"]),
           "Two seeds, a row each. The semantic latents decide almost everything. The caption alone, which training "
           "seldom gave Stage B, is not enough.", train.noisy_conditions)


def training(guide):
    """What Stages B and C make early, halfway and at the end of their training"""
    for stage in "bc":
        sheets = sorted((guide.folder / "sheets").glob(f"{stage}_*.png"))
        for path in sorted({*sheets[:1], *sheets[len(sheets) // 2:][:1], *sheets[-1:]}):
            yield Image.open(path), (f"Stage {stage.upper()} at step {int(path.stem[2:])}. Top row: test images; "
                                     "below, what the model makes of them and of their captions."), train.fit


STATIONS = (words, stage_a, semantic, noise, stage_c, attention, guidance, stage_b, training)


def where(function):
    """-> "FILE: NAME (line N)", where a function is defined"""
    function = inspect.unwrap(function)
    path, line = Path(inspect.getsourcefile(function)), inspect.getsourcelines(function)[1]
    return f"{path.resolve().relative_to(HERE.resolve()).as_posix()}: {function.__qualname__} (line {line})"


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caption", nargs="?", default=CAPTION)
    parser.add_argument("--run", type=Path, default=MODEL)
    parser.add_argument("--out", default="tour", help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    guide, out, parts = Guide(args.run, args.caption), Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    for number, station in enumerate(STATIONS, 1):
        for i, (image, text, *functions) in enumerate(station(guide), 1):
            image.save(path := out / f"{number}_{station.__name__}_{i}.png")
            title, text = html.escape(station.__doc__), html.escape(text)
            data = base64.b64encode(path.read_bytes()).decode()
            parts += [f"<h2>{number}. {title}</h2>"] if i == 1 else []
            parts.append(f'<figure><img alt="{text}" width="{image.width}" src="data:image/png;base64,{data}">'
                         f'<figcaption>{text}<br><code>{"; ".join(map(where, functions))}</code>'
                         "</figcaption></figure>")
    (out / "index.html").write_text(
        f"{HEAD}<h1>Inside Würstchen: “{html.escape(args.caption)}”</h1>" + "\n".join(parts) + "</html>", "utf-8")
    print(out / "index.html")


if __name__ == "__main__":
    run_script(main, "stopped")
