"""The classifier that judges runs on CIFAR, and what it says of a run."""
import json
from argparse import Namespace

import pytest
import torch
from PIL import Image

import cifar
import score
from small import make_model, make_run, one_core  # noqa: F401
from test_data import CLASSES, cifar_folder


def test_the_classifier_learns_what_colour_means():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(100)
    images = torch.rand(300, 32, 32, 3) / 2 + torch.eye(3)[labels].view(300, 1, 1, 3) / 2
    network = cifar.Classifier(3, width=8)
    cifar.train_classifier(network, images[:240], labels[:240], epochs=4, batch=16)
    assert (network.eval()(images[240:]).argmax(dim=1) == labels[240:]).float().mean() > 0.9


def test_grid_and_border():
    torch.manual_seed(0)
    noise = torch.rand(200, 32, 32, 3)
    assert cifar.grid(noise) == pytest.approx(1, abs=0.3)
    dotted = noise.clone()
    dotted[:, ::4, ::4] += 1
    assert cifar.grid(dotted) > 5
    framed = torch.full((2, 32, 32, 3), 0.5)
    assert cifar.border(framed) == 0
    framed[:, 0] = 0  # one side of four
    assert cifar.border(framed) == pytest.approx(-255 / 2 / 4, rel=0.1)


def test_what_is_said_of_a_run(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", make_model())
    options = json.loads((run / "options.json").read_text()) | dict(
        data="cifar10", data_dir=str(cifar_folder(tmp_path / "data")))
    (run / "options.json").write_text(json.dumps(options))

    def always_the_first(network, images, labels):
        assert images.shape == (100, 32, 32, 3) and labels.bincount().tolist() == [24, 24, 26, 26]
        torch.nn.init.zeros_(network.head.weight)
        network.head.bias.data = torch.eye(4)[0]
    with pytest.raises(cifar.UserError, match="is not a run on CIFAR"):
        cifar.main(["--run", str(tmp_path)])
    monkeypatch.setattr(cifar, "train_classifier", always_the_first)
    cifar.main(["--run", str(run), "--count", "2", "--cfg", "3"])
    first = (run / "cifar.json").read_text()
    found = json.loads(first)
    assert [*found] == ["real test images", "at the run's size", "by Stage A", "by Stage B, without caption",
                        "by Stage B", "by Stage B, guidance 1", "generated, no guidance", "generated, guidance 3 and 1"]
    for part in found.values():
        assert part["right"] == 0.25 and part["by class"]["a bird"] == 1 and part["Fréchet"] > 0
    assert found["real test images"]["Fréchet"] < found["generated, no guidance"]["Fréchet"]
    assert Image.open(run / "cifar.png").size == (2 * 68 + 4, 4 * 68 + 4)
    assert Image.open(run / "nearest.png").size == (4 * 36 + 4, 3 * 36 + 4)
    judge = score.Judge(cifar.Wuerstchen.load(run), Namespace(run=run, count=3, inception=None))
    assert set(judge.examples("test")[1]) <= set(CLASSES["cifar10"])  # one caption of each image
    monkeypatch.setattr(cifar, "train_classifier", None)  # the run keeps it
    cifar.main(["--run", str(run), "--count", "2", "--cfg", "3"])
    assert (run / "cifar.json").read_text() == first
