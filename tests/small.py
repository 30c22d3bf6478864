"""A small model with random weights, in which everything has an effect: for tests of drawing that need no training."""
import copy
import json

import pytest
import torch

from tokenizer import Tokenizer
from train import Shapes
from wuerstchen import CLIP, PRESETS, Wuerstchen, shrink


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
    config.c.depth = config.text.depth = config.text_b.depth = 1
    config.b.channels, config.b.heads, config.c.width = (16, 32, 32), (0, 2, 2), 48
    tokenizer = Tokenizer.train((Shapes(64).caption(i) for i in range(300)), merges=200, length=24)
    config.text.vocab_size = config.text_b.vocab_size = len(tokenizer)
    model = Wuerstchen(config, tokenizer)
    for p in model.parameters():  # fresh networks begin with many zeros
        p += 0.05 * torch.randn_like(p)
    for norm in model.modules():
        norm.momentum = 0.5
    images = shapes(8)
    for _ in range(10):  # latents with mean 0 and deviation 1, as after training
        model.a.train().encode(images)
        model.compressor.train()(shrink(images))
    model.c.latent_mean += 0.3
    model.c.latent_std *= 1.5
    return model.eval()


def make_run(folder, model):
    """A run folder that holds the model, and a contrastive model with random weights."""
    model.save(folder)
    torch.save(CLIP(model.config).state_dict(), folder / "clip.pt")
    (folder / "options.json").write_text(json.dumps(dict(preset="tiny", data="shapes", image_size=64, seed=0,
                                                         data_dir=None, flip=False)))
    return folder
