"""The trained run that comes with the code: what it generates, judged by the checker."""
import shutil

import pytest
import torch

import sample
from sample import EXAMPLE
from score import check_all, psnr
from train import Shapes
from wuerstchen import Wuerstchen


@pytest.fixture(scope="module")
def model():
    return Wuerstchen.load(EXAMPLE)


@pytest.mark.parametrize("split", ["test", "heldout"])
def test_it_generates_what_the_captions_say(model, split):
    captions = [Shapes(split=split).caption(i) for i in range(32)]
    shares = check_all(model.generate(captions, seed=list(range(32))), captions)
    assert shares["whole"] >= 0.85 and min(shares[name] for name in ("colour", "relation", "background")) >= 0.96


def test_it_reconstructs_images(model):
    images, captions = zip(*(Shapes(split="test")[i] for i in range(24)))
    images = torch.stack([sample.to_tensor(image) for image in images])
    by_a, by_b = model.reconstruct(images, seed=0)
    assert psnr(by_a, images).mean() > 30 and psnr(by_b, images).mean() > 26
    assert check_all(by_a, captions)["whole"] == 1 and check_all(by_b, captions)["whole"] >= 0.85


def test_sample_generates_with_it_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EXAMPLE, "runs/tiny")
    for command, said in (([], f"generating with {EXAMPLE}, which comes with the code\n"),
                          (["--run", "runs/tiny"], "generating with runs/tiny\n")):
        sample.main(["a red circle", "--steps-c", "10", "--device", "cpu", *command])
        output = capsys.readouterr().out
        assert said in output and f"PyTorch {torch.__version__} on cpu, float32, " in output
        assert check_all(sample.to_tensor(sample.Image.open("out.png"))[None], ["a red circle"])["whole"] == 1


def test_words_that_it_has_never_seen_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample.main(["a small RED pony below two blue ponys", "--negative", "a zebra", "--steps-c", "1", "--steps-b", "1"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("never seen")]
    assert said == ["never seen in training: pony, two, ponys", "never seen in training: zebra"]
    assert sample.Image.open("out.png").size == (128, 128)
