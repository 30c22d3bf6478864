"""From nothing to images, with the preset tiny at 64 px; and what happens when something goes wrong."""
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from conftest import HERE, SMALL, metrics, run_script
from small import last_words
from wuerstchen import Wuerstchen


def test_all_stages_leave_what_they_promise(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "options.json", "tokenizer", "text.pt", "clip.pt", "a.pt", "b.pt", "c.pt", "sheets",
                     "curves.png", "metrics.jsonl", "report.md"}
    assert {path.name for path in (run / "sheets").iterdir()} == {f"{stage}_000004.png" for stage in "abc"}
    assert Image.open(run / "sheets/a_000004.png").width == 8 * 68 + 4
    rows = metrics(run)
    assert {row["stage"] for row in rows} == {"text", "a", "b", "c"}
    assert all(row.keys() >= {"step", "lr", "loss", "images_per_s"} for row in rows)
    assert all(np.isfinite(value) for row in rows for key, value in row.items() if key != "stage")
    assert json.loads((run / "options.json").read_text()).items() >= {"data": "shapes", "image_size": 64}.items()


def test_report(run):
    """A row for each stage, with as many cells as the header; what it links to exists."""
    text = (run / "report.md").read_text("utf-8")
    header, _, *rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert f"PyTorch {torch.__version__} on cpu" in text and "Preset tiny, data shapes, 64 px" in text
    assert [row[0].strip() for row in rows] == ["text", "a", "b", "c"] and {len(row) for row in rows} == {len(header)}
    last = {row["stage"]: row for row in metrics(run)}
    for stage, minutes, steps, batch, speed, memory, loss, test_loss, _ in rows:
        row = last[stage.strip()]
        assert (int(steps), int(batch)) == (4, 8) and 0 <= float(minutes) < 5 and 0.1 < float(memory) < 20
        assert float(loss) == pytest.approx(row["loss"], abs=1e-4)
        assert float(test_loss) == pytest.approx(row["test_loss"], abs=1e-4)
    for link in re.findall(r"\]\((.+?)\)", text):
        assert (run / link).exists(), link


def test_all_skips_what_is_finished(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.glob("*.pt")}
    train.main(["--run", str(run), *SMALL])
    assert {path: path.stat().st_mtime_ns for path in run.glob("*.pt")} == before
    assert capsys.readouterr().out.count("already trained") == 4


def test_seed_negative_guidance_steps_sampler_and_size_matter(run):
    model = Wuerstchen.load(run)
    for p in model.c.parameters():  # after four steps of training, C's output is too small to notice
        p.data += 0.05 * torch.randn_like(p)

    def generate(seed=0, steps=(3, 2), **options):
        return model.generate(["a red star", "a big blue star above a green cross"], seed=seed, steps=steps, **options)

    plain = generate()
    assert plain.shape == (2, 64, 64, 3) and plain.min() >= 0 and plain.max() <= 1 and torch.equal(plain, generate())
    for options in (dict(seed=1), dict(negative="a blue star"), dict(guidance=(1.0, 1.0)), dict(guidance=(4.0, 2.0)),
                    dict(sampler="ddim"), dict(steps=(4, 2)), dict(steps=(3, 3)), dict(steps=("fast", 2))):
        assert not torch.equal(plain, generate(**options)), options
    assert generate(size=(96, 128)).shape == (2, 96, 128, 3)
    seen = []
    generate(after_step=lambda x, x0, t: seen.append(t.item()) or x)
    assert seen == pytest.approx([2 / 3, 1 / 3, 0, 0.5, 0])
    with pytest.raises(ValueError, match="unknown sampler euler"):
        generate(sampler="euler")


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
    some = Wuerstchen.load(run, ("b", "text"))  # in either order, the compressor is the one that B was trained with
    assert torch.equal(some.compressor.mapper.weight, model.compressor.mapper.weight)


def test_the_script_as_a_command(run, tmp_path):
    done = run_script("sample.py", "a red circle", "a blue star", "--count", "3", "--run", run, "--out",
                      tmp_path / "grid.png", "--steps-c", "2", "--steps-b", "2")
    assert done.returncode == 0 and done.stdout.endswith(f"wrote {tmp_path}/grid.png\n"), done.stderr
    assert Image.open(tmp_path / "grid.png").size == (3 * 68 + 4, 2 * 68 + 4)


@pytest.mark.parametrize("command, message", [
    ("sample.py a-cat --run {begun}", "a.pt: train this run first"),
    ("train.py b --run {begun}", "a.pt: train this run first"),
    ("train.py --preset huge", "invalid choice: 'huge'"),
    ("train.py --image-size 50", "multiple of 32"),
    ("train.py --image-size 128 --run {run}", "image_size 64"),
    ("train.py --data cifar10", "--data cifar10 needs a --data-dir"),
    ("train.py --data-dir {run}", "--data shapes takes no --data-dir; give --data too"),
    ("train.py --data cifar10 --data-dir {run}", "cifar-10-batches-bin: --data-dir must be the folder that holds"),
    ("train.py --data folder --data-dir {none}", "none is not a folder"),
    ("train.py --data folder --data-dir {run}", "too few images"),
    ("train.py --run {code}", "is not empty, and is not a run"),
    ("train.py --data folder --data-dir=", "--data folder needs a --data-dir"),
    ("train.py --run {part}", "is not empty, and is not a run (it has no options.json)"),
    ("sample.py a-cat --run {part}", "/tokenizer: train this run"),
    ("train.py b --init-from {none}", "there is no such folder"),
    ("train.py --download", "--download needs --data cifar10 or cifar100 or coco"),
    ("train.py --init-from {run}", "--init-from needs the stage to train"),
    ("train.py --device cuda", "--device cuda: PyTorch"),
    ("sample.py a-cat --device cuda", "--device cuda: PyTorch"),
    ("train.py text --run {odd}", "config.json: "),
    ("train.py b --run {damaged}", "text.pt: it may be damaged"),
    ("train.py a --run {unfit}", "options.json is not JSON"),
])
def test_bad_commands_get_one_clear_line(run, tmp_path, command, message):
    if "--device cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    places = {name: tmp_path / name for name in ("begun", "damaged", "unfit", "odd", "part", "none")}
    for name in ("begun", "damaged", "odd"):
        shutil.copytree(run, places[name], ignore=shutil.ignore_patterns("[abc].pt", "clip.pt"))  # text.pt is finished
    (places["damaged"] / "text.pt").write_bytes((run / "text.pt").read_bytes()[:-1000])
    (places["damaged"] / "a.pt").touch()
    (places["odd"] / "config.json").write_text('{"b": 3}')
    shutil.copytree(run, places["part"], ignore=shutil.ignore_patterns("options.json", "tokenizer"))
    places["unfit"].mkdir()
    (places["unfit"] / "options.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    name, *words = command.format(run=run, code=HERE, **places).split()
    assert message in last_words(name, "--run", tmp_path / "x", *words)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize("parse_args, option, values", [
    (train.parse_args, "--steps", (-1, 0, 1.5)), (train.parse_args, "--batch-size", (1, 10**9)),
    (train.parse_args, "--lr", ("inf", 0, "nan", -1e-3)), (train.parse_args, "--cache", (0, "all")),
    (train.parse_args, "--seed", (-1, 2**40)), (train.parse_args, "--workers", (-2, 10**4)),
    (train.parse_args, "--log-every", (0,)), (train.parse_args, "--save-every", (-5, 0)),
    (train.parse_args, "--image-size", (31, -64, 10**5)), (sample.parse_args, "--count", (0, -1)),
    (sample.parse_args, "--seed", (-1, 2**64)), (sample.parse_args, "--height", (-64, 0)),
    (sample.parse_args, "--width", (10**9, "wide")), (sample.parse_args, "--steps-c", (0, -1)),
    (sample.parse_args, "--steps-b", (0, 10**7)), (sample.parse_args, "--cfg", ("nan", "inf", -2)),
    (sample.parse_args, "--cfg-b", ("nan", "-inf", 1000)), (sample.parse_args, "--strength", (1.01, -0.1, "nan")),
    (sample.parse_args, "--out", ("star", "a.txt", ".", "a.xbm", "a.mp4", "none/a.png")),
    (sample.parse_args, "--film", ("a.jpg", "a.mov", "a.bmp", "none/a.gif"))])
def test_values_out_of_range_are_refused(parse_args, option, values, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in values:
        with pytest.raises(SystemExit) as stopped:
            parse_args([f"{option}={value}"])
        said = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and f"argument {option}: " in said and str(value) in said
    assert not any(tmp_path.iterdir())


def test_what_ends_a_script(capsys):
    """One line for an error that the user can fix, even from another process; a traceback for a bug."""
    def fail(error):
        raise error
    worker = "Caught OSError in DataLoader worker process 0.\\nOriginal Traceback:\\nOSError: can't read a.png"
    for error, said in ((sample.UserError("no a.pt"), "error: no a.pt"), (OSError(28, "No space left"), "28. No"),
                        (OSError(worker.replace("\\n", "\n")), "error: OSError: can't read a.png"),
                        (MemoryError(), "MemoryError"), (KeyboardInterrupt(), "\nstopped here"),
                        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: DefaultCPU")):
        with pytest.raises(SystemExit, match=said):
            sample.run_script(lambda: fail(error), "stopped here")
    for error in (ValueError("x"), IndexError(), RuntimeError("shapes"), AssertionError()):
        with pytest.raises(type(error)):
            sample.run_script(lambda: fail(error), "stopped here")


def test_a_terminal_that_can_print_little(run, tmp_path):
    """What it can't print is escaped, and the image is written all the same."""
    done = run_script("sample.py", "ένα αστέρι " * 30, "--run", run, "--out", tmp_path / "a.png", "--steps-c", "1",
                      "--steps-b", "1", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "left out" in done.stdout and "never seen in training: \\u03ad" in done.stdout
    assert Image.open(tmp_path / "a.png").size == (64, 64)
