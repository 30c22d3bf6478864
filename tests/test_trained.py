"""The trained run that comes with the code: what it draws, judged by the checker."""
import shutil

import pytest
import torch

import sample
from conftest import HERE
from score import check_all, psnr
from train import Shapes
from wuerstchen import Wuerstchen


@pytest.fixture(scope="module")
def model():
    return Wuerstchen.load(HERE / "tests" / "shapes")


@pytest.mark.parametrize("split", ["test", "heldout"])
def test_it_draws_what_the_captions_say(model, split):
    captions = [Shapes(split=split).caption(i) for i in range(32)]
    shares = check_all(model.generate(captions, seed=list(range(32))), captions)
    assert shares["whole"] >= 0.85 and min(shares[name] for name in ("colour", "relation", "background")) >= 0.96


def test_it_rebuilds_images(model):
    images, captions = zip(*(Shapes(split="test")[i] for i in range(24)))
    images = torch.stack([sample.to_tensor(image) for image in images])
    by_a, by_b = model.reconstruct(images, seed=0)
    assert psnr(by_a, images).mean() > 30 and psnr(by_b, images).mean() > 26
    assert check_all(by_a, captions)["whole"] == 1 and check_all(by_b, captions)["whole"] >= 0.85


def test_sample_draws_with_it_until_there_is_a_run_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for chosen in (HERE / "tests" / "shapes", "runs/tiny"):
        sample.main(["a red circle", "--steps-c", "10", "--device", "cpu"])
        assert f"drawing with {chosen}\n" in capsys.readouterr().out
        assert check_all(sample.to_tensor(sample.Image.open("out.png"))[None], ["a red circle"])["whole"] == 1
        shutil.copytree(HERE / "tests" / "shapes", "runs/tiny", dirs_exist_ok=True)
