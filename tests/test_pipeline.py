"""From nothing to pictures, at a size smaller than tiny; and what happens when something is wrong."""
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from wuerstchen import PRESETS, STAGES, Wuerstchen

HERE = Path(__file__).parent.parent
SMALL = ["--image-size", "64", "--steps", "4", "--batch-size", "8", "--cache", "32", "--sheet-every", "4"]


def run_script(*args, timeout=120):
    return subprocess.run([sys.executable, *map(str, args)], cwd=HERE, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, trained for a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    train.main(["--run", str(folder), *SMALL])
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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


def test_every_parameter_has_one_optimizer_and_large_matrices_have_muon():
    model = Wuerstchen(PRESETS["tiny"], None)
    network = torch.nn.ModuleDict(dict(text=model.text, c=model.c))
    adamw, muon = train.make_optimizers(network, lambda name: 0.1 if name.startswith("text") else 1, muon=True)
    shared = [p for optimizer in (adamw, muon) for group in optimizer.param_groups for p in group["params"]]
    assert len(shared) == len(set(shared)) == len(list(network.parameters()))
    matrices = {p: group["pace"] for group in muon.param_groups for p in group["params"]}
    assert matrices[model.c.blocks[0].expand.weight] == 3
    assert matrices[model.text.layers[0].project.weight] == pytest.approx(0.3)
    assert not {model.text.tokens.weight, model.text.positions, model.c.embed.weight, model.c.out.weight,
                model.c.blocks[0].depthwise.weight, model.c.blocks[0].expand.bias} & set(matrices)
    assert len(train.make_optimizers(network, lambda name: 1, muon=False)) == 1


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_goes_on(run, tmp_path, number):
    """Ctrl-C and a polite kill save and say how to go on: from the step they stopped at, none left out, none twice."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "options.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    (folder / "tokenizer").symlink_to(run / "tokenizer")
    command = ["train.py", "text", "--run", folder, "--steps", "60", "--batch-size", "8", "--log-every", "1"]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, stderr=subprocess.PIPE, text=True)
    log = folder / "metrics.jsonl"
    deadline = time.time() + 60
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert f"to go on from there: python train.py text --run {folder} --steps 60" in errors
    stopped = metrics(folder)[-1]["step"]
    assert (folder / "text.ckpt").exists() and 3 <= stopped < 60
    finished = run_script(*command)
    assert finished.returncode == 0 and f"going on from step {stopped}" in finished.stdout
    steps = [row["step"] for row in metrics(folder) if "loss" in row]
    assert steps == list(range(1, 61))


@pytest.mark.parametrize("stage", ["text", "a", "b", "c"])
def test_a_killed_run_that_goes_on_ends_in_the_same_weights(run, tmp_path, stage, monkeypatch):
    def folder(name):
        copy = tmp_path / name
        shutil.copytree(run, copy)
        (copy / f"{stage}.pt").unlink()
        return copy

    def go(folder):
        train.main([stage, "--run", str(folder), "--steps", "7", "--batch-size", "4", "--cache", "32", "--save-every",
                    "3", "--precision", "float32"])
        return torch.load(folder / f"{stage}.pt", weights_only=True)

    whole, average = go(folder("whole")), train.update_average
    killed = folder("killed")
    for last in (4, 5):  # dies twice after the checkpoint of step 3, without a chance to save
        def die(network_average, network, step):
            if step == last:
                raise RuntimeError("killed")
            average(network_average, network, step)
        monkeypatch.setattr(train, "update_average", die)
        with pytest.raises(RuntimeError, match="killed"):
            go(killed)
    monkeypatch.setattr(train, "update_average", average)
    again = go(killed)
    for network in whole:
        for name in whole[network]:
            assert torch.equal(whole[network][name], again[network][name]), f"{network}.{name}"


def make_cifar(folder, count=50):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records = rng.integers(256, size=(count, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(count) % 10
        (folder / name).write_bytes(records.tobytes())


def test_cifar_folder_and_archive_agree(tmp_path):
    make_cifar(tmp_path / "x" / "cifar-10-batches-bin")
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "x" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    places = [tmp_path / "x", tmp_path / "x" / "cifar-10-batches-bin", tmp_path / "cifar-10-binary.tar.gz", tmp_path]
    sets = [train.Cifar10(place, 64, seed=1) for place in places]
    for i in (0, 7, 49, 50, 123):
        picture, caption = sets[0][i]
        assert picture.shape == (64, 64, 3) and any(name in caption for name in train.CIFAR_CLASSES)
        for other in sets[1:]:
            assert (other[i][0] == picture).all() and other[i][1] == caption
    raw = np.fromfile(tmp_path / "x" / "cifar-10-batches-bin" / "data_batch_1.bin", np.uint8).reshape(-1, 3073)
    data = train.Cifar10(tmp_path / "x", 32)
    seen = {data[i][0].tobytes() for i in range(50)}
    assert seen == {r[1:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for r in raw}  # every picture once an epoch
    record, _ = data.start(3)
    assert train.CIFAR_CLASSES[raw[record, 0]] in data.caption(3)


def test_cifar_trains_through_every_stage(tmp_path):
    make_cifar(tmp_path / "data" / "cifar-10-batches-bin")
    train.main(["--run", str(tmp_path / "run"), "--data", "cifar10", "--data-dir", str(tmp_path / "data"),
                "--image-size", "32", "--steps", "2", "--batch-size", "4", "--cache", "16"])
    assert all((tmp_path / "run" / f"{stage}.pt").exists() for stage in STAGES)
    with pytest.raises(ValueError, match="was begun with --data cifar10"):
        train.main(["--run", str(tmp_path / "run"), "--data", "shapes"])


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
    (["train.py", "--data", "cifar10", "--data-dir", "{run}", "--run", "{tmp}/x"], "no CIFAR-10"),
    (["train.py", "--data", "cifar10", "--data-dir", "{run}/config.json", "--run", "{tmp}/x"], "is not CIFAR-10"),
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
