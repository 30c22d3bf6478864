"""What several tests need: a small model with random weights, in which everything has an effect; odd image files; the
last line that a script prints."""
import contextlib
import copy
import io
import json
import runpy
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer import Tokenizer
from train import Shapes
from wuerstchen import CLIP, PRESETS, Wuerstchen, rescaled


@pytest.fixture(autouse=True, scope="module")
def one_core():
    """Such a small model gains nothing from a second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shapes(count, side=64):
    data = Shapes(side, seed=3)
    return torch.stack([torch.from_numpy(data[i][0]) for i in range(count)]) / 255


@torch.no_grad()
def make_model():
    torch.manual_seed(0)
    config = copy.deepcopy(PRESETS["tiny"])
    config.image_size = 64
    config.c.depth = config.text_c.depth = config.text_b.depth = 1
    config.b.channels, config.b.heads, config.c.width = (16, 32, 32), (0, 2, 2), 48
    tokenizer = Tokenizer.train((Shapes(64).caption(i) for i in range(300)), merges=200, length=24)
    config.text_c.vocab_size = config.text_b.vocab_size = len(tokenizer)
    model = Wuerstchen(config, tokenizer)
    for p in model.parameters():  # fresh networks begin with many zeros
        p += 0.05 * torch.randn_like(p)
    for norm in model.modules():
        norm.momentum = 0.5
    images = shapes(8)
    for _ in range(10):  # latents with mean 0 and deviation 1, as after training
        model.a.train().encode(images)
        model.compressor.train()(rescaled(images, model.config.rescale))
    model.c.latent_mean += 0.3
    model.c.latent_std *= 1.5
    return model.eval()


def make_run(folder, model):
    """A run folder that holds the model, and a contrastive model with random weights."""
    model.save(folder)
    torch.save(CLIP(model.config).state_dict(), folder / "clip.pt")
    (folder / "options.json").write_text(json.dumps(dict(preset="tiny", data="shapes", image_size=64, seed=0,
                                                         data_dir=None)))
    return folder


RED, BLUE = (200, 40, 30), (30, 60, 200)


def odd_images(folder):
    """Image files of every kind that people have. -> {name: its colour, as a viewer shows it}"""
    red, blue, white, grey = Image.new("RGB", (40, 40), RED), Image.new("RGB", (40, 40), BLUE), (255,) * 3, (90,) * 3
    palette, exif, lying = red.quantize(4), Image.Exif(), Image.new("RGB", (80, 40), BLUE)
    lying.paste(RED, (0, 0, 40, 40))  # on top once it is turned
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    wide = Image.new("RGB", (120, 40), BLUE)
    wide.paste(RED, (40, 0, 80, 40))
    images = {
        "plain.png": (red, RED), "photo.JPG": (red.resize((800, 600)), RED), "cmyk.jpg": (red.convert("CMYK"), RED),
        "web.webp": (red, RED), "palette.png": (palette, RED), "wide.png": (wide, RED), "lying.png": (lying, None),
        "opaque.png": (Image.new("RGBA", (40, 40), (*RED, 255)), RED),
        "clear.png": (Image.new("RGBA", (40, 40)), white), "clear_palette.png": (palette, white),
        "glass.png": (Image.new("RGBA", (40, 40), (*RED, 51)), (244, 212, 210)),  # a fifth red, the rest white
        "grey.png": (Image.new("L", (40, 40), 90), grey),
        "grey_alpha.png": (Image.new("LA", (40, 40), (90, 255)), grey),
        "grey16.png": (Image.fromarray(np.full((40, 40), 90 * 257, np.uint16)), grey),
        "one_bit.png": (Image.new("1", (40, 40), 1), white), "frames.gif": (red, RED)}
    options = {"photo.JPG": dict(quality=95), "cmyk.jpg": dict(quality=95), "web.webp": dict(lossless=True),
               "clear_palette.png": dict(transparency=palette.getpixel((20, 20))), "lying.png": dict(exif=exif),
               "frames.gif": dict(save_all=True, append_images=[blue])}
    for name, (image, _) in images.items():
        image.save(folder / name, **options.get(name, {}))
    return {name: colour for name, (_, colour) in images.items()}


def last_words(script, *arguments):
    """Runs `python script arguments` in this process -> its last line, which must be a message, not a traceback"""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with (contextlib.redirect_stderr(output), mock.patch("sys.argv", [script, *map(str, arguments)]),
          pytest.raises(SystemExit) as stopped):
        runpy.run_path(str(Path(__file__).parent.parent / script), run_name="__main__")
    output.seek(0)
    message = stopped.value.code if isinstance(stopped.value.code, str) else output.read().splitlines()[-1]
    assert message.count("\n") == 0
    return message
