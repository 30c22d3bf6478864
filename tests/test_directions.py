"""The variations on the paper: each command runs, and what it changes has an effect."""
import json
from dataclasses import replace

import pytest
import torch

import directions
import paper
import train
from test_networks import CONFIG, init


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder, in which version 2 is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("direction, found", {
    "tokens": "as published", "positions": "by attention, with positions", "quantized": "4 channels, rounded",
    "steps": "generated, ddim", "upsampling": "semantic latents of 64 px", "text": "without captions"}.items())
def test_direction(direction, found, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(directions, "OUT", tmp_path)
    monkeypatch.setattr(directions, "COUNT", 2)
    monkeypatch.setattr(directions, "train_stage", lambda stage, folder, *options: paper.train_stage(
        stage, folder, *options, "--steps", "1", "--batch-size", "2", "--cache", "8"))
    fit = train.fit  # without sheets and test loss
    monkeypatch.setattr(train, "fit", lambda run, stage, network, batches, loss_fn, lr_scale=lambda name: 1, **_: fit(
        run, stage, network, batches, loss_fn, lr_scale=lr_scale))
    directions.main([direction, "--run", str(runs)])
    assert found in (tmp_path / f"{direction}.json").read_text("utf-8")
    assert (tmp_path / f"{direction}.png").exists()


def test_codes():
    codes = torch.randint(625, (2, 3, 3))
    semantic = directions.from_codes(codes)
    assert semantic.shape == (2, 3, 3, 4) and semantic.abs().max() == 2
    assert torch.equal(directions.to_codes(semantic), codes)


@torch.no_grad()
def test_places_tell_equal_cells_apart():
    config = replace(CONFIG, b=replace(CONFIG.b, sees_semantic=(False,) * 3))
    x, t, text = torch.randn(1, 8, 16, 4), torch.tensor([0.5]), torch.randn(1, 8, 12)
    cells = torch.randn(2, 2, 6)
    for cls, tells in ((directions.AttentionStageB, False), (directions.AttentionStageBWithPlaces, True)):
        b = init(cls(config), 0.3).eval()
        one, other = b(x, t, cells[None], text), b(x, t, cells.flip(0)[None], text)
        assert torch.allclose(one, other, atol=1e-4) != tells  # attention does not see in which order the cells come
        assert not torch.allclose(one, b(x, t, cells[None] + 1, text), atol=1e-3)


def test_quantized_compressor_rounds_and_learns():
    compressor = init(directions.QuantizedCompressor(CONFIG), 0.3)
    e = compressor(torch.rand(2, 64, 64, 3))
    assert set(e.flatten().tolist()) <= {-2.0, -1.0, 0.0, 1.0, 2.0}
    e.square().sum().backward()
    assert all(p.grad is not None for p in compressor.parameters())
