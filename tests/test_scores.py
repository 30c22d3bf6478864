"""The scores: formulas against values computed by hand or by other programs; the judge; the two commands."""
import argparse
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import score
from small import make_model, make_run, one_core  # noqa: F401
from train import Shapes
from wuerstchen import CLIP

FEW = ["--count", "4", "--steps-c", "2", "--steps-b", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    return make_run(tmp_path_factory.mktemp("runs") / "run", model)


def judge_of(model, run, inception=None):
    return score.Judge(model, argparse.Namespace(run=run, count=6, inception=inception))


def test_psnr():
    x = torch.zeros(2, 4, 4, 3)
    y = torch.stack([torch.full((4, 4, 3), 0.1), torch.full((4, 4, 3), 0.5)])
    assert score.psnr(x, y).tolist() == pytest.approx([20, -10 * math.log10(0.25)], abs=1e-4)


def test_frechet():
    points = torch.tensor([-1.0, 1.0])[:, None]  # mean 0, variance 2
    assert score.frechet(points, points + 3) == pytest.approx(9)
    assert score.frechet(points, 2 * points) == pytest.approx((2 * math.sqrt(2) - math.sqrt(2)) ** 2)
    # Variance 2 along one axis each, with 45° between the axes: S1 and S2 do not commute.
    x, y = torch.tensor([[-1.0, 0], [1, 0]]), torch.tensor([[-1.0, -1], [1, 1]]) / math.sqrt(2)
    assert score.frechet(x, y) == pytest.approx(2 + 2 - 2 * math.sqrt(2 * 2 / 2))
    rng = np.random.default_rng(0)
    rng.random((4, 24, 20, 3))  # the recorded values belong to the random numbers after these
    many = rng.standard_normal((50, 6)), rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6)) + 0.5
    few = rng.standard_normal((5, 8)), rng.standard_normal((6, 8)) + 0.5
    # torchmetrics 1.9.0, image.fid._compute_fid; the first also with scipy 1.17.1's sqrtm
    for pair, recorded in ((many, 18.67991812918574), (few, 14.1580)):
        assert score.frechet(*map(torch.from_numpy, pair)) == pytest.approx(recorded, rel=1e-5)


def test_codebook_usage():
    assert score.codebook_usage(torch.tensor([0, 0, 1, 1]), 8) == pytest.approx((0.25, 2))
    assert score.codebook_usage(torch.full((5, 5), 3), 8) == (0.125, 1)


def test_wilson():
    # 8 of 10 by hand: (0.8 + 0.19207 ± 1.96·√(0.016 + 0.0096)) / 1.38415
    assert score.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-5)
    assert score.wilson(0, 10) + score.wilson(10, 10) == pytest.approx((0, 0.2775328, 0.7224672, 1), abs=1e-5)


@torch.no_grad()
def test_judge(model, run):
    judge = judge_of(model, run)
    (images, captions), (others, _) = judge.examples("test"), judge.examples("test", batch=1)
    data = Shapes(64, seed=0, split="test")
    assert captions == [data.caption(i) for i in range(6)] and ((others[0] * 255).byte().numpy() == data[6][0]).all()
    same, different = judge(images, captions, images), judge(images, captions, others)
    assert abs(same["Fréchet"]) < 1e-3 * different["Fréchet"]
    assert all(same[key] == 1 for key in (*score.ATTRIBUTES, "whole")) and same["95%"] == score.wilson(6, 6)
    images[:2] = 1
    spoilt = judge(images, captions, others)
    assert spoilt["whole"] == spoilt["count"] == 4 / 6 and spoilt["95%"] == score.wilson(4, 6)
    # This caption names no size, relation or background.
    assert set(score.check_all(images[-1:], ["a red star"])) == {"colour", "shape", "count", "whole", "95%"}


@torch.no_grad()
@pytest.mark.parametrize("sign", [1, -1])
def test_clip_score_is_the_mean_cosine_of_image_and_caption(model, run, sign):
    judge = judge_of(model, run)
    images, captions = judge.examples("test")
    ids, mask = model.tokenizer(captions)
    small = F.interpolate(images.movedim(-1, 1), (48, 48), mode="bicubic", antialias=True).movedim(1, -1)
    clip = CLIP(model.config).eval()
    clip.load_state_dict(torch.load(run / "clip.pt"))
    cells = F.adaptive_avg_pool2d(clip.image(small).movedim(-1, 1), 3)  # 9 parts
    image = clip.image_projection(cells.flatten(2).movedim(1, -1).flatten(1))
    text = clip.text_projection(torch.stack([clip.text(i[None], m[None])[0, m.sum() - 1] for i, m in zip(ids, mask)]))
    expected = (100 * (sign * F.cosine_similarity(image, text)).clamp(min=0)).mean().item()
    judge.clip.text_projection.weight *= sign
    assert judge(images, captions, images)["CLIP"] == pytest.approx(expected, abs=1e-3)


class Inception(torch.nn.Module):
    """Takes what StyleGAN's file takes: uint8 images, channels first. Its features are the mean colour."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and x.dtype == torch.uint8 and x.shape[1] == 3
        return x.float().mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_inception(model, run, tmp_path):
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    judge, images = judge_of(model, run, str(tmp_path / "inception.pt")), torch.rand(3, 64, 64, 3)
    torch.testing.assert_close(judge.features(images), 255 * images.mean(dim=(1, 2)), atol=0.1, rtol=0)


def test_generate_gives_each_image_its_own_seed(model, monkeypatch):
    args = argparse.Namespace(seed=3, steps_c=1, steps_b=2, cfg=2.0, cfg_b=1.0)
    calls = []

    def generate(captions, **options):
        calls.append((captions, options))
        return torch.zeros(len(captions), 64, 64, 3)

    monkeypatch.setattr(model, "generate", generate)
    captions = [f"image {i}" for i in range(197)]  # 195 are 798,720 pixels
    assert len(score.generate(model, captions, args, cfg=4.0)) == 197
    assert [some for some, _ in calls] == [captions[:195], captions[195:]]
    assert calls[1][1] == dict(seed=[198, 199], steps=(1, 2), guidance=(4.0, 1.0))


def test_score(model, run, capsys):
    (run / "report.md").write_text("# run\n")
    score.main(["--run", str(run), *FEW, "--seed", "5"])
    table, kept = capsys.readouterr().out.splitlines(), json.loads((run / "score.json").read_text("utf-8"))
    rows, usage = kept["rows"], kept["codebook"]
    assert table[0].split() == [*score.ATTRIBUTES, "whole", "95%", "CLIP", "Fréchet", "PSNR"]
    assert list(rows) == ["generated", "generated, held-out pairs", "reconstructed by B and A",
                          "same, B given the captions", "reconstructed by A", "the images"]
    assert all(line.startswith(name) for line, name in zip(table[1:], rows)) and kept["settings"]["steps_c"] == 2
    assert rows["the images"]["whole"] == 1 and "PSNR" not in rows["generated"]
    assert f"Codebook: {usage['usage']:.1%} in use" in table[7] and 1 <= usage["perplexity"] <= 256
    # PSNR is that of the images that the model reconstructs with these seeds.
    images, captions = zip(*(Shapes(64, split="test")[i] for i in range(4)))
    images, seeds = torch.from_numpy(np.stack(images)) / 255, [5, 6, 7, 8]
    by_a, by_b = model.reconstruct(images, steps=2, seed=seeds)
    told = model.reconstruct(images, list(captions), steps=2, seed=seeds)[1]
    for name, made in {"reconstructed by A": by_a, "reconstructed by B and A": by_b,
                       "same, B given the captions": told}.items():
        assert rows[name]["PSNR"] == pytest.approx(score.psnr(made, images).mean().item(), abs=1e-3)
    assert rows["reconstructed by B and A"]["PSNR"] != rows["same, B given the captions"]["PSNR"]
    assert "4 images per row:\n\n```\n" + "\n".join(table[:7]) in (run / "report.md").read_text("utf-8")


def test_score_of_another_data_set_without_clip(run, tmp_path, monkeypatch, capsys):
    """There is no checker, no CLIP score and no Fréchet distance: only PSNR remains."""
    class Photos:
        def __getitem__(self, i):
            return np.random.default_rng(i).integers(256, size=(64, 64, 3), dtype=np.uint8), f"photo {i}"

    for path in run.iterdir():
        if path.name not in ("clip.pt", "options.json", "score.json", "report.md"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "options.json").write_text(json.dumps(dict(data="photos")))
    asked = []
    monkeypatch.setattr(score, "open_data", lambda args: asked.append(args) or dict(test=Photos()))
    score.main(["--run", str(tmp_path), *FEW])
    rows = json.loads((tmp_path / "score.json").read_text("utf-8"))["rows"]
    assert asked == [argparse.Namespace(data="photos", image_size=64)]
    assert rows["generated"] == {} and list(rows["reconstructed by A"]) == ["PSNR"]
    assert "generated, held-out pairs" not in rows
    assert f"No CLIP score: {tmp_path} has no clip.pt" in capsys.readouterr().out


def test_sweep(run, tmp_path, monkeypatch):
    settings = []

    def generate(model, captions, args, **changes):
        settings.append((len(captions), changes))
        return torch.ones(len(captions), 64, 64, 3)

    monkeypatch.setattr(score, "generate", generate)
    score.main(["a red star", "--sweep", "--run", str(run), *FEW, "--out", str(tmp_path / "grid.png")])
    tables = json.loads((run / "sweep.json").read_text("utf-8"))
    assert settings[:36] == [(1, dict(cfg=cfg, steps_c=n)) for n in (1, 2, 4, 8, 16, 60) for cfg in (0, 1, 2, 4, 8, 16)]
    assert settings[36:] == [(4, {name: value}) for name, values in score.SWEEP.items() for value in values]
    assert list(tables["steps_c"]) == ["1", "2", "4", "8", "16", "60"] and tables["cfg"]["1"]["whole"] == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 7 * 64 and grid.height > 6 * 64
    with Image.open(tmp_path / "grid.plot.png") as image:
        assert image.size == (640, 360)
