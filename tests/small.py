"""A small model with random weights, in which everything has an effect: for tests of drawing that need no training."""
import copy
import json

import torch

from tokenizer import Tokenizer
from train import Shapes
from wuerstchen import CLIP, PRESETS, Wuerstchen, shrink


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
    tokenizer = Tokenizer.train(["a small red circle", "a big blue star above a green cross"] * 3, merges=40, length=24)
    config.text.vocab_size = config.text_b.vocab_size = len(tokenizer)
    model = Wuerstchen(config, tokenizer)
    for p in model.parameters():  # fresh networks begin with many zeros
        p += 0.05 * torch.randn_like(p)
    images = shapes(16)
    for _ in range(40):  # latents with mean 0 and deviation 1, as after training
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
                                                         data_dir=None)))
    return folder
