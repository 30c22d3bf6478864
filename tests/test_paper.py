"""The tools that measure the paper's claims compare what they claim to compare."""
import json

import pytest
import torch

import paper
import train
from small import make_model, one_core, shapes  # noqa: F401
from wuerstchen import PRESETS, StageB, StageC


def test_baseline_has_as_many_parameters_as_b_and_c():
    with torch.device("meta"):
        unet, b, c = (sum(p.numel() for p in make(PRESETS["tiny"]).parameters())
                      for make in (paper.make_baseline, StageB, StageC))
    assert unet == pytest.approx(b + c, rel=0.01)


@torch.no_grad()
def test_generate_baseline():
    model = make_model()
    unet = paper.make_baseline(model.config).eval()
    torch.nn.init.normal_(unet.out.weight, std=0.1)  # untrained, it ignores the caption
    captions = ["a red star", "a red star", "a blue cross"]
    images = paper.generate_baseline(model, unet, model.text_b, captions, [5, 5, 5], 2)
    assert images.shape == (3, 64, 64, 3)
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_baseline(run, tmp_path, monkeypatch):
    """Both are trained and watched; the time that the measuring takes does not count."""
    def slow(images, captions):
        clock[0] += 1000
        return {"whole": images.mean().item()}

    def tick():
        clock[0] += 1
        return clock[0]

    clock = [0]
    monkeypatch.setattr(paper.time, "time", tick)
    monkeypatch.setattr(paper, "check_all", slow)
    monkeypatch.setattr(paper, "OUT", tmp_path)
    monkeypatch.setattr(paper, "generate", lambda model, captions: torch.full((96, 64, 64, 3), 0.25))
    monkeypatch.setattr(paper, "generate_baseline",
                        lambda model, unet, text, captions, seeds: torch.full((len(seeds), 64, 64, 3), 0.5))
    monkeypatch.setitem(train.RECIPES, "tiny", {stage: train.Recipe(3, 8, 1e-3) for stage in train.TRAIN})
    monkeypatch.setattr(paper, "train_stage", lambda *command, train_stage=paper.train_stage: train_stage(
        *command, "--steps", "3", "--cache", "64"))  # B's time, too, from 3 steps
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    paper.main(["baseline", "--run", str(run), "--steps", "3"])
    found = json.loads((tmp_path / "baseline.json").read_text("utf-8"))
    c, b, unet = (found[name] for name in ("C on a trained B", "B, then C", "one U-Net"))
    assert len(c) == len(b) == len(unet) == 3
    assert all(point["whole"] == 0.25 for point in c) and all(point["whole"] == 0.5 for point in unet)
    assert all(point["seconds"] < 1000 for point in c) and all(b[i]["seconds"] > c[i]["seconds"] for i in range(3))
    assert (tmp_path / "baseline.png").exists()
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
