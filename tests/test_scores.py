"""The scores: formulas against values worked out by hand and recorded from other programs; tables and files."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
from small import make_model, make_run, one_core, shapes
from train import Shapes
from wuerstchen import CLIP


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", make_model())


def noisy_pair():
    rng = np.random.default_rng(0)
    x = rng.random((2, 24, 20, 3))
    y = np.clip(x * 0.8 + 0.2 * rng.random((2, 24, 20, 3)) + 0.02, 0, 1)
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()


# Formulas.


def test_psnr():
    x = torch.zeros(2, 4, 4, 3)
    y = torch.stack([torch.full((4, 4, 3), 0.1), torch.full((4, 4, 3), 0.5)])
    assert sample.psnr(x, y).tolist() == pytest.approx([20, -10 * math.log10(0.25)], abs=1e-4)
    # scikit-image 0.26.0, peak_signal_noise_ratio(data_range=1)
    assert sample.psnr(*noisy_pair()).tolist() == pytest.approx([21.460157846811327, 21.43044402827585], abs=1e-4)


def test_ssim():
    x, y = torch.full((1, 12, 13, 3), 0.2), torch.full((1, 12, 13, 3), 0.6)
    assert sample.ssim(x, x).item() == pytest.approx(1)
    # Without any structure only the means are compared.
    assert sample.ssim(x, y).item() == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2 ** 2 + 0.6 ** 2 + 1e-4), abs=1e-5)
    x, y = noisy_pair()
    # scikit-image 0.26.0, structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=1, channel_axis=-1), in float64. (torchmetrics 1.9.0 also counts windows over mirrored borders.)
    assert sample.ssim(x, y).tolist() == pytest.approx([0.9453077243982877, 0.9515307684900232], abs=1e-5)
    assert sample.ssim(x, 1 - x).max() < 0


def test_frechet():
    points = torch.tensor([-1.0, 1.0])[:, None]  # mean 0, variance 2
    assert sample.frechet(points, points + 3) == pytest.approx(9)
    assert sample.frechet(points, 2 * points) == pytest.approx((2 * math.sqrt(2) - math.sqrt(2)) ** 2)
    # Two axes at a right angle, which do not commute with a third between them: variances 2 and 2, cosine² 1/2.
    x = torch.tensor([[-1.0, 0], [1, 0]])
    y = torch.tensor([[-1.0, -1], [1, 1]]) / math.sqrt(2)
    assert sample.frechet(x, y) == pytest.approx(2 + 2 - 2 * math.sqrt(2 * 2 / 2))
    rng = np.random.default_rng(0)
    rng.random((4, 24, 20, 3))  # those of noisy_pair
    many = rng.standard_normal((50, 6)), rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6)) + 0.5
    few = rng.standard_normal((5, 8)), rng.standard_normal((6, 8)) + 0.5
    # torchmetrics 1.9.0, image.fid._compute_fid; the first also by scipy 1.17.1's sqrtm
    for pair, recorded in ((many, 18.67991812918574), (few, 14.1580)):
        assert sample.frechet(*map(torch.from_numpy, pair)) == pytest.approx(recorded, rel=1e-5)
    assert sample.frechet(*(torch.from_numpy(few[0]),) * 2) == pytest.approx(0, abs=1e-5)


def test_wilson():
    # Wilson's formula for 8 of 10 by hand: (0.8 + 0.19207 ± 1.96·√(0.016 + 0.0096)) / 1.38415
    assert sample.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-5)
    assert sample.wilson(0, 10) == pytest.approx((0, 0.2775328), abs=1e-5)
    assert sample.wilson(10, 10) == pytest.approx((0.7224672, 1), abs=1e-5)
    low, high = sample.wilson(95, 100)
    assert 0.88 < low < 0.95 < high < 0.98


def test_check_all_counts():
    data = Shapes(64, seed=1)
    captions = [data.caption(i) for i in range(20)]
    pictures = torch.stack([torch.from_numpy(data[i][0]) for i in range(20)]) / 255
    right = sample.check_all(pictures, captions)
    assert all(right[key] == 1 for key in (*sample.ATTRIBUTES, "whole")) and right["whole_95"] == sample.wilson(20, 20)
    pictures[:5] = 1.0
    found = sample.check_all(pictures, captions)
    assert found["whole"] == found["count"] == 0.75 and found["whole_95"] == sample.wilson(15, 20)
    one = sample.check_all(pictures[-1:], ["a red star"])  # names neither size, relation nor background
    assert set(one) == {"colour", "shape", "count", "whole", "whole_95"}


# The judge.


def judge_of(run, *options):
    args = sample.parse_args(["--score", "--run", str(run), "--score-count", "6", *options])
    return sample.Judge(sample.load_model(args), args)


@torch.no_grad()
def test_clip_score_is_the_cosine_of_each_picture_and_its_caption(run):
    judge = judge_of(run)
    images, captions = judge.examples("test")
    ids, mask = judge.model.tokenizer(captions)
    small = F.interpolate(images.movedim(-1, 1), (48, 48), mode="bicubic", antialias=True).movedim(1, -1)
    clip = CLIP(judge.model.config).eval()
    clip.load_state_dict(torch.load(run / "clip.pt"))
    cells = F.adaptive_avg_pool2d(clip.image(small).movedim(-1, 1), 3)  # 9 parts, one feature after the other
    image = clip.image_projection(cells.flatten(2).movedim(1, -1).flatten(1))
    text = clip.text_projection(torch.stack([clip.text(i[None], m[None])[0, m.sum() - 1] for i, m in zip(ids, mask)]))
    cosine = F.cosine_similarity(image, text)
    expected = (100 * cosine.clamp(min=0)).tolist()
    assert judge.clip_score(images, captions).tolist() == pytest.approx(expected, abs=1e-3)
    judge.clip.text_projection.weight *= -1
    expected = (100 * (-cosine).clamp(min=0)).tolist()
    assert judge.clip_score(images, captions).tolist() == pytest.approx(expected, abs=1e-3)
    assert max(expected) > 0


@torch.no_grad()
def test_judge(run):
    judge = judge_of(run)
    images, captions = judge.examples("test")
    others, _ = judge.examples("test", batch=1)
    assert len(images) == 6 and not torch.equal(images, others)
    same, different = judge(images, captions, images), judge(images, captions, others)
    assert same["whole"] == 1 and abs(same["frechet"]) < 1e-3 * different["frechet"]
    assert judge(1 - images, captions, images)["whole"] < 0.5


def test_examples_come_in_batches_of_any_size(run):
    judge = judge_of(run)
    x, words = torch.arange(70.0), [str(i) for i in range(70)]
    assert torch.equal(judge.by(lambda x, words: x + torch.tensor([float(w) for w in words]), x, words), 2 * x)


class Inception(torch.nn.Module):
    """Called as StyleGAN's file: uint8 pictures with channels first; answers with the mean colour."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and x.dtype == torch.uint8 and x.shape[1] == 3
        return x.float().mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_inception(run, tmp_path):
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    features = sample.inception(str(tmp_path / "inception.pt"), "cpu")
    images = shapes(3)
    torch.testing.assert_close(features(images), 255 * images.mean(dim=(1, 2)), atol=1e-3, rtol=1e-3)
    judge = judge_of(run, "--inception", str(tmp_path / "inception.pt"))
    assert judge(images, ["a red star"] * 3, images.flip(2))["frechet"] == pytest.approx(0, abs=1e-2)
    assert judge(images, ["a red star"] * 3, images / 2)["frechet"] > 100
    for bad in (run / "clip.pt", run / "options.json", run / "none.pt"):
        with pytest.raises(ValueError, match="as a TorchScript file") as caught:
            sample.inception(str(bad), "cpu")
        assert "\n" not in str(caught.value)


# The commands.

FEW = ["--score-count", "4", "--steps-c", "2", "--steps-b", "2"]


def test_score(run, capsys):
    sample.main(["--score", "--run", str(run), *FEW])
    table, kept = capsys.readouterr().out.splitlines(), json.loads((run / "score.json").read_text())
    assert table[0].split()[-5:] == ["%", "CLIP", "Fréchet", "PSNR", "SSIM"]
    assert [line[:22].strip() for line in table[1:7]] == list(kept["rows"])
    assert kept["pictures"] == 4 and kept["settings"]["steps_c"] == 2
    assert kept["rows"]["the pictures"]["whole"] == 1 and "psnr" not in kept["rows"]["drawn"]
    assert kept["rows"]["rebuilt by A"]["psnr"] > kept["rows"]["rebuilt by B and A"]["psnr"]
    assert table[1].endswith(f"{kept['rows']['drawn']['frechet']:.2f}" + 16 * " ")
    assert 0 < kept["codebook"]["usage"] <= 1 <= kept["codebook"]["perplexity"] <= 256
    assert f"Codebook: {kept['codebook']['usage']:.1%} in use" in table[7]


def test_score_rebuilds_from_the_semantic_latents_alone(run, monkeypatch):
    """... and says what B makes of them with the caption; the numbers are of the pictures that `vary` gives."""
    args = sample.parse_args(["--score", "--run", str(run), *FEW, "--seed", "5"])
    model = sample.load_model(args)
    sample.score(model, args)
    rows = json.loads((run / "score.json").read_text())["rows"]
    images, captions = sample.Judge(model, args).examples("test")
    for name, told in (("rebuilt by B and A", None), ("same, B told captions", captions)):
        rebuilt = model.vary(images, told, seed=[5, 6, 7, 8], steps_b=2)
        assert rows[name]["psnr"] == pytest.approx(sample.psnr(rebuilt, images).mean().item(), abs=1e-3)
        assert rows[name]["ssim"] == pytest.approx(sample.ssim(rebuilt, images).mean().item(), abs=1e-4)
    assert rows["rebuilt by B and A"]["psnr"] != rows["same, B told captions"]["psnr"]


def test_score_without_the_contrastive_model(run, tmp_path, capsys):
    older = tmp_path / "older"
    older.mkdir()
    for path in run.iterdir():
        if path.name != "clip.pt":
            (older / path.name).symlink_to(path)
    sample.main(["--score", "--run", str(older), *FEW])
    table = capsys.readouterr().out
    assert "Fréchet" not in table.splitlines()[0] and "CLIP" not in table.splitlines()[0] and "SSIM" in table
    assert f"No CLIP score and Fréchet distance: {older} has no clip.pt" in table


def test_score_of_another_data_set(run, tmp_path, monkeypatch, capsys):
    """All but the checker's part."""
    asked = []

    class Photos:
        skipped = []

        def __getitem__(self, i):
            return np.random.default_rng(i).integers(256, size=(64, 64, 3), dtype=np.uint8), f"photo {i}"

    def open_data(args, split):
        asked.append((args.data, args.image_size, split))
        return Photos()

    monkeypatch.setattr(sample, "open_data", open_data)
    other = tmp_path / "other"
    other.mkdir()
    for path in run.iterdir():
        if path.name != "options.json":
            (other / path.name).symlink_to(path)
    (other / "options.json").write_text(json.dumps(dict(data="photos", image_size=64)))
    sample.main(["--score", "--run", str(other), *FEW])
    rows = json.loads((other / "score.json").read_text())["rows"]
    assert set(asked) == {("photos", 64, "test")}
    assert list(rows["drawn"]) == ["clip_score", "frechet"] and "psnr" in rows["rebuilt by A"]
    assert "whole" not in capsys.readouterr().out and "drawn, held-out pairs" not in rows


def test_sweep(run, tmp_path, monkeypatch):
    settings = []

    def draw(model, args, prompts, quiet):
        settings.append((args.cfg, args.steps_c, args.steps_b, args.timesteps, len(prompts)))
        return torch.ones(len(prompts), 64, 64, 3)

    monkeypatch.setattr(sample, "draw", draw)
    sample.main(["--sweep", "a red star", "--run", str(run), *FEW, "--timesteps", "fast", "--out",
                 str(tmp_path / "grid.png")])
    tables = json.loads((run / "sweep.json").read_text())
    fast = sample.FAST_TIMES
    assert settings[:15] == ([(cfg, 2, 2, fast, 4) for cfg in (1, 2, 4, 7, 10)] +
                             [(2, n, 2, None, 4) for n in (5, 10, 20, 30, 60)] +
                             [(2, 2, n, fast, 4) for n in (2, 4, 8, 12, 20)])
    assert settings[15:] == [(cfg, n, 2, None, 1) for n in (5, 10, 20, 30, 60) for cfg in (1, 2, 4, 7, 10)]
    assert list(tables["steps_c"]) == ["5", "10", "20", "30", "60"] and tables["cfg"]["1"]["whole"] == 0
    grid = sample.Image.open(tmp_path / "grid.png")
    assert grid.width == 6 * 68 + 4 and grid.height > 5 * 68
