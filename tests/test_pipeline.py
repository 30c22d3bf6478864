"""From nothing to pictures, at a size smaller than tiny; and what happens when something is wrong."""
import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from conftest import SMALL, metrics, run_script
from wuerstchen import Wuerstchen


def test_all_stages_leave_what_they_promise(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "tokenizer", "text.pt", "clip.pt", "a.pt", "b.pt", "c.pt", "metrics.jsonl",
                     "sheets"}
    assert not list(run.glob("*.ckpt*"))
    assert {path.name[0] for path in (run / "sheets").iterdir()} == {"a", "b", "c"}
    rows = metrics(run)
    assert {row["stage"] for row in rows} == {"text", "a", "b", "c"}
    assert any("psnr" in row and "codebook_usage" in row and "perplexity" in row for row in rows)
    assert all(np.isfinite(value) for row in rows for key, value in row.items() if key != "stage")


def test_all_skips_what_is_finished(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.glob("*.pt")}
    train.main(["--run", str(run), *SMALL])
    assert {path: path.stat().st_mtime_ns for path in run.glob("*.pt")} == before
    assert "finished before" in capsys.readouterr().out


def test_same_seed_same_picture(run):
    model = Wuerstchen.load(run)
    prompts = ["a small red circle", "a big blue star above a green cross"]
    draw = lambda seed: model.generate(prompts, steps_c=3, steps_b=2, seed=seed)
    first = draw(0)
    assert first.shape == (2, 64, 64, 3) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, draw(0)) and not torch.equal(first, draw(1))


def test_negative_guidance_sampler_and_size_matter(run):
    model = Wuerstchen.load(run)
    for p in model.c.parameters():  # four steps of training leave C too quiet to notice
        p.data += 0.05 * torch.randn_like(p)
    draw = lambda **options: model.generate(["a red star"], steps_c=3, steps_b=2, seed=0, **options)
    plain = draw()
    for options in (dict(negative="a blue star"), dict(guidance_c=1.0), dict(guidance_b=2.0), dict(sampler="ddim")):
        assert not torch.equal(plain, draw(**options)), options
    assert draw(height=96, width=128).shape == (1, 96, 128, 3)
    with pytest.raises(ValueError, match="no prompt"):
        model.generate([])


def test_reconstruct(run):
    model = Wuerstchen.load(run)
    images = torch.rand(2, 64, 96, 3)
    from_a, from_b = model.reconstruct(images, steps_b=2, seed=0)
    assert from_a.shape == from_b.shape == images.shape
    with pytest.raises(ValueError, match="multiples of 32"):
        model.reconstruct(torch.rand(1, 60, 64, 3))


def test_save_and_load(run, tmp_path):
    model = Wuerstchen.load(run)
    model.save(tmp_path / "copy")
    copy = Wuerstchen.load(tmp_path / "copy")
    for (name, a), (_, b) in zip(model.state_dict().items(), copy.state_dict().items()):
        assert torch.equal(a, b), name


def test_sampling_script(run, tmp_path, capsys):
    steps = ["--steps-c", "2", "--steps-b", "2", "--run", str(run)]
    sample.main(["a red circle", "--out", str(tmp_path / "one.png"), *steps])
    assert Image.open(tmp_path / "one.png").size == (64, 64)
    sample.main(["a red circle", "a blue star", "--count", "3", "--out", str(tmp_path / "grid.png"), *steps])
    width, height = Image.open(tmp_path / "grid.png").size
    assert width >= 3 * 64 and height >= 2 * 64
    sample.main(["--reconstruct", str(tmp_path / "one.png"), "--out", str(tmp_path / "r.png"), "--run", str(run)])
    assert (tmp_path / "r.png").exists() and "wrote" in capsys.readouterr().out


def test_score_counts_what_the_checker_finds(run, monkeypatch, capsys):
    """Perfect pictures score 100 %, empty ones nothing but backgrounds."""

    def perfect(model, args, captions, quiet):
        pictures = [train.draw(caption, np.random.default_rng(i), 64) for i, caption in enumerate(captions)]
        return torch.from_numpy(np.stack(pictures)) / 255

    def scores():
        sample.main(["--score", "--run", str(run), "--score-count", "40", "--steps-b", "1"])
        lines = capsys.readouterr().out.splitlines()
        return lines[1][22:].split()[:7], lines[2][22:].split()[:7]

    monkeypatch.setattr(sample, "draw", perfect)
    assert scores() == (["100.0%"] * 7, ["100.0%"] * 7)
    monkeypatch.setattr(sample, "draw", lambda model, args, captions, quiet: torch.ones(len(captions), 64, 64, 3))
    assert scores()[0][-1] == "0.0%"


def test_crops_lie_on_the_grid_of_stage_a():
    images = torch.arange(2 * 24 * 40).view(2, 24, 40, 1)
    corners = {divmod(train.crop(images, 16)[0, 0, 0].item(), 40) for _ in range(300)}
    assert corners == {(top, left) for top in (0, 4, 8) for left in range(0, 25, 4)}
    assert train.crop(images, 16).shape == (2, 16, 16, 1)


@pytest.mark.parametrize("command, message", [
    (["sample.py", "a cat", "--run", "nowhere"], "train it first"),
    (["sample.py", "a cat", "--run", "{run}/../begun"], "train it first: python train.py a"),
    (["sample.py"], "nothing to draw"),
    (["sample.py", " ", "--run", "{run}"], "empty"),
    (["sample.py", "--reconstruct", "{run}/config.json", "--run", "{run}"], "can't read"),
    (["sample.py", "--reconstruct", "{run}/none.png", "--run", "{run}"], "can't read"),
    (["sample.py", "a cat", "--run", "{run}", "--out", "{run}/none/x.png", "--steps-c", "1", "--steps-b", "1"], "x.png"),
    (["train.py", "--preset", "huge", "--run", "{tmp}/x"], "unknown preset"),
    (["train.py", "--image-size", "50", "--run", "{tmp}/x"], "multiple of 32"),
    (["train.py", "b", "--run", "{tmp}/x"], "train it first"),
    (["train.py", "--data", "cifar10", "--run", "{tmp}/x"], "needs --data-dir"),
    (["train.py", "--data", "cifar10", "--data-dir", "{tmp}/none", "--run", "{tmp}/x"], "no such data folder"),
    (["train.py", "--data", "cifar10", "--data-dir", "{run}", "--run", "{tmp}/x"], "no cifar10"),
    (["train.py", "--data", "cifar10", "--data-dir", "{run}/config.json", "--run", "{tmp}/x"], "can't be unpacked"),
    (["train.py", "--steps", "0", "--run", "{tmp}/x"], "at least 1"),
])
def test_bad_input_gets_one_clear_line(run, tmp_path, command, message):
    begun = run.parent / "begun"  # a run with only its first stage finished
    if not begun.exists():
        begun.mkdir()
        for name in ("config.json", "text.pt"):
            (begun / name).symlink_to(run / name)
        (begun / "tokenizer").symlink_to(run / "tokenizer")
    done = run_script(*(part.format(run=run, tmp=tmp_path) for part in command))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr and message in done.stderr.splitlines()[-1]
