"""From nothing to images, at a size smaller than tiny; and what happens when something is wrong."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import SMALL, metrics, run_script
from small import last_words
from wuerstchen import Wuerstchen


def test_all_stages_leave_what_they_promise(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "options.json", "tokenizer", "text.pt", "clip.pt", "a.pt", "b.pt", "c.pt", "sheets",
                     "curves.png", "metrics.jsonl"}
    assert {path.name for path in (run / "sheets").iterdir()} == {f"{stage}_000004.png" for stage in "abc"}
    assert Image.open(run / "sheets/a_000004.png").width == 8 * 68 + 4
    rows = metrics(run)
    assert {row["stage"] for row in rows} == {"text", "a", "b", "c"}
    assert all(row.keys() >= {"step", "lr", "loss", "images_per_s"} for row in rows)
    assert all(np.isfinite(value) for row in rows for key, value in row.items() if key != "stage")
    assert json.loads((run / "options.json").read_text()).items() >= {"data": "shapes", "image_size": 64}.items()


def test_all_skips_what_is_finished(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.glob("*.pt")}
    train.main(["--run", str(run), *SMALL])
    assert {path: path.stat().st_mtime_ns for path in run.glob("*.pt")} == before
    assert capsys.readouterr().out.count("already trained") == 4


def test_seed_negative_guidance_steps_sampler_and_size_matter(run):
    model = Wuerstchen.load(run)
    for p in model.c.parameters():  # four steps of training leave C too quiet to notice
        p.data += 0.05 * torch.randn_like(p)

    def draw(seed=0, steps=(3, 2), **options):
        return model.generate(["a red star", "a big blue star above a green cross"], seed=seed, steps=steps, **options)

    plain = draw()
    assert plain.shape == (2, 64, 64, 3) and plain.min() >= 0 and plain.max() <= 1 and torch.equal(plain, draw())
    for options in (dict(seed=1), dict(negative="a blue star"), dict(guidance=(1.0, 1.0)), dict(guidance=(4.0, 2.0)),
                    dict(sampler="ddim"), dict(steps=(4, 2)), dict(steps=(3, 3)), dict(steps=("fast", 2))):
        assert not torch.equal(plain, draw(**options)), options
    assert draw(size=(96, 128)).shape == (2, 96, 128, 3)
    seen = []
    draw(after_step=lambda x, x0, t: seen.append(t.item()) or x)
    assert seen == pytest.approx([2 / 3, 1 / 3, 0, 0.5, 0])
    with pytest.raises(ValueError, match="unknown sampler euler"):
        draw(sampler="euler")


def test_reconstruct(run):
    model, images = Wuerstchen.load(run), torch.rand(2, 64, 96, 3)
    from_a, from_b = model.reconstruct(images, steps=2, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(from_a, model.a(images)[0].clamp(0, 1))
        semantic = model.compress(images)
        assert semantic.shape == (2, 2, 3, 16)  # ceil(0.75·64/32), ceil(0.75·96/32)
        again = model.from_semantic(semantic, ["", ""], (16, 24), steps=2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_b, again)
    with pytest.raises(ValueError, match="multiples of 32"):
        model.reconstruct(torch.rand(1, 60, 64, 3))


def test_save_and_load(run, tmp_path):
    model = Wuerstchen.load(run)
    model.save(tmp_path / "copy")
    copy = Wuerstchen.load(tmp_path / "copy")
    assert copy.config == model.config and not copy.training
    for (name, a), (_, b) in zip(model.state_dict().items(), copy.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_script_as_a_command(run, tmp_path):
    done = run_script("sample.py", "a red circle", "a blue star", "--count", "3", "--run", run, "--out",
                      tmp_path / "grid.png", "--steps-c", "2", "--steps-b", "2")
    assert done.returncode == 0 and done.stdout.endswith(f"wrote {tmp_path}/grid.png\n"), done.stderr
    assert Image.open(tmp_path / "grid.png").size == (3 * 68 + 4, 2 * 68 + 4)


@pytest.mark.parametrize("command, message", [
    ("sample.py a-cat --run {begun}", "a.pt: train it first"),
    ("train.py b --run {begun}", "a.pt: train it first"),
    ("train.py --preset huge", "invalid choice: 'huge'"),
    ("train.py --image-size 50", "multiple of 32"),
    ("train.py --image-size 128 --run {run}", "image_size 64"),
    ("train.py --data cifar10", "needs --data-dir"),
    ("train.py --data cifar10 --data-dir {run}", "no cifar10 in"),
    ("train.py --data folder --data-dir {none}", "no images"),
    ("train.py --init-from {run}", "--init-from needs the stage to train"),
])
def test_bad_commands_get_one_clear_line(run, tmp_path, command, message):
    shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("[abc].pt"))  # only text.pt is finished
    command = command.format(run=run, begun=tmp_path / "begun", none=tmp_path / "none")
    name, *words = command.split()
    assert message in last_words(name, "--run", tmp_path / "x", *words)
