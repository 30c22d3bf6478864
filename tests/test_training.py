"""The optimizers and the training loop, what a run survives, its options and its cache."""
import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import train
from conftest import HERE, metrics
from small import last_words
from test_data import MICRO, half_bright, make_run
from wuerstchen import PRESETS, STAGES, Wuerstchen, save_atomically

FEW = ["--steps", "7", "--batch-size", "4", "--cache", "64", "--save-every", "3", "--precision", "float32"]


class Killed(Exception):
    pass


def kill(*args, **options):
    raise Killed


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A finished run of small networks. Later commands take their sizes from its config.json."""
    folder = tmp_path_factory.mktemp("runs") / "micro"
    with pytest.MonkeyPatch.context() as patch:  # fewer captions for all tests: hard negatives are made from them
        patch.setattr(train.Shapes, "captions", lambda self: map(self.caption, range(300)))
        with pytest.MonkeyPatch.context() as small:
            small.setitem(train.PRESETS, "tiny", MICRO)
            train.main(["--run", str(folder), "--image-size", "32", "--log-every", "1", *FEW])
        yield folder


@contextlib.contextmanager
def killed_after(steps):
    """The process dies in the step after these, without a chance to save."""
    update = train.AveragedModel.update_parameters
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.AveragedModel, "update_parameters",
                      lambda average, network: (kill if average.n_averaged == steps else update)(average, network))
        yield


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def small_batches(first, recipe):
    for step in range(first, recipe.steps):
        yield torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))


def fit(folder, loss_fn, *options, **more):
    """`train.fit` for a small network. -> its average"""
    folder.mkdir(exist_ok=True)
    args = train.parse_args([
        "--run", str(folder), "--device", "cpu", "--image-size", "32", "--log-every", "1", "--precision", "float32",
        "--save-every", "1", *options])
    return train.fit(train.Run(args, train.open_data(args)), "c", small_network(), small_batches, loss_fn, **more)


def test_every_parameter_has_one_optimizer_and_large_matrices_have_muon():
    model = Wuerstchen(PRESETS["tiny"], None)
    network = nn.ModuleDict(dict(text_c=model.text_c, c=model.c))
    adamw, muon = train.make_optimizers(network, lambda name: 0.1 if name.startswith("text") else 1, "dtype")
    small, large = ({p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
                    for optimizer in (adamw, muon))
    assert not small.keys() & large.keys() and small.keys() | large.keys() == set(network.parameters())
    assert sum(len(group["params"]) for o in (adamw, muon) for group in o.param_groups) == len(small) + len(large)
    block, layer = model.c.blocks[0].res, model.text_c.layers[0]
    assert large[block.expand.weight] == 3 and large[layer.project.weight] == pytest.approx(0.3)
    assert small[block.expand.bias] == small[model.c.embed.weight] == small[block.depthwise.weight] == 1  # 16 inputs
    assert small[model.text_c.tokens.weight] == small[model.text_c.positions] == 0.1
    assert isinstance(adamw, torch.optim.AdamW) and muon.dtype == "dtype"
    assert len(train.make_optimizers(nn.Linear(99, 9), lambda name: 1, "dtype")) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_torchs(dtype, monkeypatch):
    """With Jordan's five steps, wide, tall and square matrices move as with torch.optim.Muon."""
    monkeypatch.setattr(train, "NEWTON_SCHULZ", 5 * [(3.4445, -4.775, 2.0315)])
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("needs PyTorch 2.9")
    start = [torch.randn(shape) for shape in ((64, 64), (64, 64), (128, 64), (64, 192), (64, 192))]
    ours, theirs = ([x.clone().requires_grad_() for x in start] for _ in range(2))
    muon = train.Muon([dict(params=ours, lr=0.05)], dtype)
    reference = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
    assert all((p - q).norm() < 0.02 * (q - first).norm() for p, q, first in zip(ours, theirs, start))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_orthogonal(dtype):
    """The singular values become what the polynomials say: near 1, unless they are below 0.005."""
    def moved(values):
        for a, b, c in train.NEWTON_SCHULZ:
            values = a * values + b * values ** 3 + c * values ** 5
        return values

    values = moved(torch.linspace(0.005, 1.02, 10_000, dtype=torch.float64))
    assert 0.47 < values.min() and values.max() < 1.52
    for x in (torch.randn(64, 192), torch.randn(192, 64), torch.randn(64, 1) @ torch.randn(1, 64)):
        u, values, v = torch.linalg.svd(x.double(), full_matrices=False)
        values = moved(values / values.norm())
        assert (train.orthogonal(x, dtype) - u @ values.diag() @ v).abs().max() < (
            1e-4 if dtype == torch.float32 else 0.05)


def test_fit_is_this_loop(tmp_path):
    """AdamW, warm-up and cosine, clipped gradients, a moving average: written out."""
    def loss_fn(network, batch, step):
        return (network(batch) - 3).square().mean() * (0.02, 5)[step % 2], {}
    found = fit(tmp_path, loss_fn, "--steps", "45", "--lr", "0.01", lr_scale=lambda name: 2 if "0." in name else 1)
    network, lrs = small_network(), []
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW([dict(params=m.parameters()) for m in network], betas=(0.9, 0.95), weight_decay=0.01)
    for step, batch in enumerate(small_batches(0, train.Recipe(45, 0, 0))):
        lrs.append(0.01 * min((step + 1) / 3, (1 + math.cos(math.pi * step / 45)) / 2))
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 2 * lrs[-1], lrs[-1]
        optimizer.zero_grad()
        loss_fn(network, batch, step)[0].backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        for mean, p in zip(average.parameters(), network.parameters()):
            mean.data.lerp_(p.data, 1 - (1 + step) / (10 + step) if step else 1)
    for mean, p in zip(found.parameters(), average.parameters()):
        torch.testing.assert_close(mean, p, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0].running_mean, network[0].running_mean)
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx(lrs) and not found.training
    late = [torch.ones(1)]
    train.ema_update(late, [torch.zeros(1)], torch.tensor(10**6))
    assert late[0].item() == pytest.approx(0.999)


def test_float16_scales_gradients(tmp_path, monkeypatch, capsys):
    """The scale halves until the gradients are in float16's range, and grows again; a resumed run keeps it."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, growth_interval=3))

    def loss_fn(network, batch, step):  # half-precision gradients of the bias are 12.5 times the scale
        return (100 * network[1](batch / 1000)).float().sum() / 64, {}
    options = ["--precision", "float16", "--steps", "12"]
    whole = fit(tmp_path / "whole", loss_fn, *options)
    assert re.findall(r"skipped step (\d+)", capsys.readouterr().err) == ["1", "2", "3", "4", "8", "12"]
    assert torch.load(tmp_path / "whole" / "c.ckpt")["scaler"]["scale"] == 4096
    with killed_after(3):
        fit(tmp_path / "killed", loss_fn, *options)
    assert same(whole.state_dict(), fit(tmp_path / "killed", loss_fn, *options).state_dict())


def test_a_step_without_a_finite_gradient_leaves_no_trace(tmp_path):
    networks, averages, bad = [], [], (0, 3, 4, *range(10, 19))

    def loss_fn(network, batch, step):
        networks.append(copy.deepcopy(network.state_dict()))
        return network(batch * math.nan if step in bad else batch).square().mean(), {}
    fit(tmp_path, loss_fn, "--steps", "22",
        preview=lambda average, *_: averages.append(copy.deepcopy(average.state_dict())) or [])
    for states, first in ((networks, 0), (averages, 1)):
        unchanged = [step + first for step in range(21) if same(states[step], states[step + 1])]
        assert unchanged == [step for step in bad if step >= first]
    bad = range(5, 100)
    with pytest.raises(ValueError, match="10 consecutive steps"):
        fit(tmp_path / "other", loss_fn, "--steps", "30")
    assert len(networks) == 22 + 15


def test_noise_of_a_resumed_run(tmp_path):
    """Each step has noise of its own; resuming does not change it."""
    def draws(folder):
        drawn = []

        def loss_fn(network, batch, step):
            drawn.append(torch.rand(()).item())
            return network(batch).mean(), {}
        fit(folder, loss_fn, "--steps", "8")
        return drawn
    whole = draws(tmp_path / "whole")
    assert len(set(whole)) == 8
    with killed_after(4):
        draws(tmp_path / "killed")
    assert draws(tmp_path / "killed") == whole[4:]


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_and_ends_in_the_same_weights(micro, tmp_path, stage):
    folder = shutil.copytree(micro, tmp_path / "killed")
    (folder / f"{stage}.pt").unlink()
    for steps in (4, 5):  # dies twice after the checkpoint of step 3
        with killed_after(steps):
            train.main([stage, "--run", str(folder), *FEW])
    train.main(["all", "--run", str(folder), *FEW])  # the others are finished
    for whole, again in zip(*(torch.load(run / f"{stage}.pt").values() for run in (micro, folder)), strict=True):
        assert same(whole, again)
    assert {row["stage"] for row in metrics(folder)[len(metrics(micro)):]} == {stage}
    assert not (folder / f"{stage}.ckpt").exists() and not (folder / "cache").exists()


def test_the_same_command_resumes_after_ctrl_c(micro, tmp_path):
    folder = shutil.copytree(micro, tmp_path / "run")
    log = folder / "metrics.jsonl"
    log.unlink()
    command = ["a", "--run", str(folder), *FEW, "--steps", "60", "--save-every", "2", "--log-every", "1"]
    if sys.platform == "win32":
        pytest.skip("only a console can send Ctrl-C")
    process = subprocess.Popen([sys.executable, "train.py", *command], cwd=HERE, stderr=subprocess.PIPE, text=True)
    while not (log.exists() and len(metrics(folder)) > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    stopped = metrics(folder)[-1]["step"]
    assert process.returncode == 1 and 3 < stopped < 60 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("stopped; run the same command again")
    with pytest.raises(train.UserError, match="raise --steps to at least that"):
        train.main([*command, "--steps", "1"])
    train.main(command)
    steps = [row["step"] for row in metrics(folder)]
    assert steps[:stopped] == list(range(1, stopped + 1)) and steps[stopped:] in (
        list(range(first, 61)) for first in (stopped - 1, stopped, stopped + 1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_files_are_written_atomically(tmp_path):
    path, big = tmp_path / "x", torch.zeros(500_000)
    save_atomically(path, dict(step=-1))
    for _ in range(6):
        before = torch.load(path)["step"]
        if not (child := os.fork()):
            for step in range(before + 1, 10**9):
                save_atomically(path, dict(step=step, big=big))
        while torch.load(path)["step"] < before + 3:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert torch.load(path)["step"] >= before + 3


@pytest.mark.parametrize("error", [OSError("[Errno 28] No space left"), RuntimeError("[enforce fail] unexpected pos")])
def test_a_full_disk_leaves_the_last_file_whole(tmp_path, monkeypatch, error):
    path, text = tmp_path / "x", tmp_path / "x.json"
    save_atomically(path, dict(step=-1))
    save_atomically(text, "{}")
    saved = path.read_bytes()

    def full(state, file):
        file.write_bytes(saved[:1000])
        raise error
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(train.Path, "write_text", lambda file, text, **options: full(text, file))
    for file in (path, text):
        with pytest.raises(OSError, match="disk full|No space"):
            save_atomically(file, "{1}" if file == text else dict(step=0))
    monkeypatch.undo()
    assert path.read_bytes() == saved and text.read_text() == "{}" and len(list(tmp_path.iterdir())) == 2


def test_a_run_on_a_full_disk_resumes_when_there_is_room(micro, tmp_path, monkeypatch):
    """In a process that may write no large files: first in the cache, then in a checkpoint."""
    resource = pytest.importorskip("resource")
    folder = shutil.copytree(micro, tmp_path / "run")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}
    for stage, size, said in (("b", 50_000, "too large"), ("a", 100_000, "a.ckpt: is the disk full")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(OSError, match=said):
                train.main([stage, "--run", str(folder), *FEW])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert not list(folder.rglob("*.new")) and {path: path.read_bytes() for path in folder.glob("*.pt")} == before
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('5\n{"stage": "te')  # the plot leaves out such lines
    train.main(["text", "--run", str(folder), *FEW])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 9000))
    with pytest.raises(train.UserError, match="only 0.0 GB is free: give a smaller --cache"):
        train.main(["b", "--run", str(folder), *FEW])


def test_a_finished_run(micro):
    rows, model = metrics(micro), Wuerstchen.load(micro)
    for stage in STAGES:
        assert [row["step"] for row in rows if row.get("stage") == stage and "loss" in row] == [*range(1, 8)]
    assert {path.name for path in (micro / "sheets").iterdir()} == {
        f"{stage}_{step:06}.png" for stage in "abc" for step in (3, 6, 7)}
    images = torch.stack([torch.from_numpy(train.Shapes(32)[i][0]) for i in range(256)]) / 255
    assert 0.56 < model.a.scale / model.a.encode(images).std() < 0.66  # 2.4 times 32/128
    assert not same(model.text_c.state_dict(), model.text_b.state_dict())  # C trains its own


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_continues_from_given_weights(micro, tmp_path, stage):
    """At a learning rate next to 0, what is trained stays what was given, at another size too."""
    folder = tmp_path / "fine"
    train.main([stage, "--run", str(folder), "--init-from", str(micro), "--image-size", "64", *FEW, "--steps", "2",
                "--lr", "1e-9"])
    given, fine = Wuerstchen.load(micro), Wuerstchen.load(folder)
    assert fine.config.image_size == 64 and train.read_options(folder)["init_from"] == str(micro)
    for (name, x), y in zip(given.state_dict().items(), fine.state_dict().values()):
        if not any(part in name for part in ("running", "num_batches", "a.scale", "c.latent")):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4, msg=name)
    assert fine.generate(["a red star"], steps=(1, 1)).shape == (1, 64, 64, 3)
    given, fine = (torch.load(path / "clip.pt", weights_only=True) for path in (micro, folder))
    torch.testing.assert_close(given["text_projection.weight"], fine["text_projection.weight"], atol=1e-6, rtol=1e-4)


def test_a_run_from_given_weights_has_their_data_unless_told_otherwise(tmp_path):
    given = dict(preset="cifar", image_size=64, data="cifar10", data_dir="there")
    (tmp_path / "options.json").write_text(json.dumps(given))
    begin = ["c", "--init-from", str(tmp_path), "--run", str(tmp_path / "new")]
    assert given.items() <= vars(train.parse_args(begin)).items()
    other = train.parse_args([*begin, "--data", "folder", "--data-dir", "here"])
    assert (other.preset, other.data, other.data_dir) == ("cifar", "folder", "here")


def test_the_command_overrides_the_run_which_overrides_the_defaults(micro, tmp_path, monkeypatch):
    folder, seen = shutil.copytree(micro, tmp_path / "run"), []
    monkeypatch.setattr(train, "Run", lambda args, data: seen.append(args) or kill())
    for options in ([], ["--seed", "5", "--flip", "--cache", "128"], ["--no-flip", "--freeze-text"], ["--lr", "3"]):
        with pytest.raises(Killed):
            train.main(["c", "--run", str(folder), *options])
    assert [args.seed for args in seen] == [0, 5, 5, 5] and [args.flip for args in seen] == [False, True, False, False]
    assert [args.cache for args in seen] == [64, 128, 128, 128] and {args.image_size for args in seen} == {32}
    assert [args.freeze_text for args in seen] == [False, False, True, True] and seen[-1].precision == "float32"
    assert train.read_options(folder) == train.read_options(micro) | dict(seed=5, cache=128, freeze_text=True)


def test_device_and_precision_are_saved_only_if_given(micro, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(micro, tmp_path / "run")
    options = train.read_options(micro)
    assert options["device"] is None and options["precision"] == "float32"
    (folder / "options.json").write_text(json.dumps(options | dict(precision=None)))
    monkeypatch.setattr(train, "Run", kill)
    monkeypatch.setattr(train, "pick_precision", lambda device: "bfloat16")
    for command, said, saved in (([], "bfloat16", (None, None)), (["--device", "cpu"], "cpu, bfloat16", ("cpu", None)),
                                 (["--precision", "float16"], "cpu, float16", ("cpu", "float16")),
                                 (["--device", "auto"], ", float16", ("auto", "float16"))):
        with pytest.raises(Killed):
            train.main(["c", "--run", str(folder), *command])
        line, = capsys.readouterr().out.splitlines()
        assert line.startswith(f"PyTorch {torch.__version__} on ") and said in line and ", CPU threads: " in line
        options = train.read_options(folder)
        assert (options["device"], options["precision"]) == saved


@pytest.mark.parametrize("missing", [["tokens", "init_from"], ["device", "precision", "freeze_text", "cache", "flip"]])
def test_a_run_older_than_an_option_resumes(micro, tmp_path, missing):
    folder = shutil.copytree(micro, tmp_path / "run")
    options = {name: value for name, value in train.read_options(micro).items() if name not in missing}
    (folder / "options.json").write_text(json.dumps(options | dict(gone=5)))
    args = train.parse_args(["--run", str(folder)])
    assert [getattr(args, name) for name in ("tokens", "init_from", "device", "freeze_text", "flip", "cache")] == [
        False, None, None, False, False, options.get("cache", 16_384)]
    assert "was started with tokens False" in last_words("train.py", "--run", folder, "--tokens")
    train.main(["a", "--run", str(folder), *FEW])


def test_an_unfinished_stage_resumes_as_it_was_begun(micro, tmp_path, capsys):
    folder = shutil.copytree(micro, tmp_path / "run")
    begun = ["a", "--run", str(folder), "--steps", "9", "--batch-size", "3", "--lr", "0.002", "--save-every", "4"]
    for first in (0, 4):  # the second time, it resumes
        with killed_after(6):
            train.main(begun if first == 0 else ["a", "--run", str(folder), "--save-every", "4"])
        said = capsys.readouterr().out
        assert ("resuming from step 4\n" in said) == (first == 4) and "begun with" not in said
    train.main(["a", "--run", str(folder), "--steps", "12", "--lr", "0.001", "--log-every", "1"])
    said = capsys.readouterr().out
    assert "from step 4, steps 12 (begun with 9), lr 0.001 (begun with 0.002)\n" in said
    assert [row["step"] for row in metrics(folder)][-8:] == [*range(5, 13)]
    assert (folder / "report.md").read_text().splitlines()[-1].split(" | ")[2:4] == ["12", "3"]  # steps, batch
    assert metrics(folder)[-8]["lr"] == pytest.approx(0.001 * (0.5 + 0.5 * math.cos(math.pi * 4 / 12)))


def test_a_checkpoint_older_than_what_it_builds_on_is_refused(micro, tmp_path):
    """With another Stage B, the semantic latents are others than those that C had learned."""
    folder = shutil.copytree(micro, tmp_path / "run")
    with killed_after(6):
        train.main(["c", "--run", str(folder), *FEW])
    os.utime(folder / "b.pt")
    with pytest.raises(train.UserError, match="c.ckpt is older than .*b.pt: delete it to begin stage c again"):
        train.main(["c", "--run", str(folder), *FEW])


def test_a_checkpoint_resumes_in_another_precision(tmp_path):
    """So does one saved before checkpoints contained the recipe."""
    def loss_fn(network, batch, step):
        return network(batch).float().square().mean(), {}
    options = ["--steps", "6", "--save-every", "1"]
    for precision in ("float32", "float16", "float32"):
        fit(tmp_path, loss_fn, *options, "--precision", precision)
        state = torch.load(tmp_path / "c.ckpt")
        state.pop("recipe", None)
        torch.save(state | dict(step=3), tmp_path / "c.ckpt")


def test_errors_are_one_line(micro, tmp_path):
    new = tmp_path / "new"
    for name, value in (("preset", "small"), ("data", "coco"), ("image-size", "64"), ("init-from", "x")):
        said = last_words("train.py", "--run", micro, f"--{name}", value)
        assert f"was started with {name.replace('-', '_')} " in said
    for message, *options in (("multiple of 32", "--image-size", "40"), ("needs a --data-dir", "--data", "coco"),
                              ("needs the stage to train", "--init-from", micro),
                              ("0 with captions", "--data", "folder", "--data-dir", tmp_path)):
        assert message in last_words("train.py", "--run", new, *options) and not new.exists()


def test_the_test_loss_always_has_the_same_noise(run, tmp_path):
    """It is computed at every checkpoint, with the averaged weights in evaluation mode, and changes nothing else."""
    def train_b(name, tests):
        folder, seen = shutil.copytree(run, tmp_path / name), []
        for file in ("b.pt", "c.pt", "metrics.jsonl"):
            (folder / file).unlink()
        with pytest.MonkeyPatch.context() as patch:
            if not tests:
                patch.setattr(train.Run, "test_batches", lambda *_: ())
            loss = train.stage_b_loss
            patch.setattr(train, "stage_b_loss", lambda b, compressor, *more, latents, **named: seen.append(
                (b.training, compressor.training, latents.mean().item())) or loss(
                    b, compressor, *more, latents=latents, **named))
            train.main(["b", "--run", str(folder), "--steps", "6", "--save-every", "2", "--batch-size", "32", "--lr",
                        "1e-12", "--log-every", "1", "--cache", "64"])
        return metrics(folder), seen
    rows, seen = train_b("with", True)
    without, _ = train_b("without", False)
    assert [row["step"] for row in rows if "test_loss" in row] == [2, 4, 6]
    assert [row["loss"] for row in rows] == [row["loss"] for row in without] and "test_loss" not in without[1]
    tests = [one for one in seen if not one[0]]
    assert len(tests) == 6 and not any(compressor for _, compressor, *_ in tests)  # 64 images, three times
    assert tests[:2] == tests[2:4] == tests[4:]  # the same images
    found = [row["test_loss"] for row in rows if "test_loss" in row]
    assert found == pytest.approx(3 * [found[0]], rel=0.01)  # with the same noise; only BatchNorm's statistics change


def test_the_cache_is_read_while_it_is_newer_than_its_sources(micro, tmp_path, monkeypatch):
    folder, computed = shutil.copytree(micro, tmp_path / "run"), []

    def begin(stage, *options):
        """-> how many batches were computed for the cache"""
        computed.clear()
        with pytest.raises(Killed):
            train.main([stage, "--run", str(folder), *FEW, *options])
        return len(computed)
    monkeypatch.setattr(train, "fit", kill)
    monkeypatch.setattr(train.Run, "test_batches", lambda *_: [])
    for place, name in ((train, "rescaled"), (Wuerstchen, "compress")):  # b and c compute these
        monkeypatch.setattr(place, name, lambda *x, f=getattr(place, name): computed.append(0) or f(*x))
    for stage, before in (("b", "a.pt"), ("c", "b.pt")):
        assert [begin(stage), begin(stage)] == [4, 0]
        os.utime(folder / before, (time.time() + 0.01,) * 2)
        time.sleep(0.02)
        assert [begin(stage), begin(stage)] == [4, 0]
        assert [begin(stage, "--cache", "100"), begin(stage), begin(stage, "--cache", "64")] == [7, 4, 0]


def test_the_cache_has_mirror_images_and_all_captions(tmp_path):
    (tmp_path / "options.json").write_text("{}")
    run = make_run(tmp_path, "--data", "folder", "--data-dir", half_bright(tmp_path / "data", 40), "--flip")
    count, computed = len(run.train_data.items), []

    def compute(images):
        computed.append(len(images))
        if len(computed) == 2:  # half a cache does not count
            raise Killed
        return dict(images=images, mirrored=images[:, 16, 2, 0] < 0.5)
    with pytest.raises(Killed):
        run.cached("x", "options.json", compute)
    arrays = run.cached("x", "options.json", compute)
    rows = [(int(re.search(r"\d+", captions)[0]), mirrored, image.tobytes()) for captions, mirrored, image in zip(
        arrays["captions"], arrays["mirrored"].tolist(), arrays["images"], strict=True)]
    assert computed == [32] * (2 + math.ceil(count / 16)) and len({i for i, _, _ in rows}) == count
    assert {(i, mirrored) for i, mirrored, _ in rows} == {
        (i, mirrored) for i, _, _ in rows for mirrored in (False, True)[:1 + (i % 4 > 0)]}
    batches, recipe = run.cached_batches(arrays), train.Recipe(200, 6, 0)
    whole, late = list(batches(0, recipe)), list(batches(40, recipe))
    assert len(late) == 160 and all(one["captions"] == other["captions"] and torch.equal(one["images"], other["images"])
                                   for one, other in zip(whole[40:], late, strict=True))
    seen = {(int(re.search(r"\d+", caption)[0]), caption.startswith("image")) for batch in whole
            for caption, image, mirrored in zip(batch["captions"], batch["images"], batch["mirrored"].tolist())
            if (int(re.search(r"\d+", caption)[0]), mirrored, image.numpy().tobytes()) in rows}
    assert seen == {(i, first) for i, _, _ in rows for first in (True, False)}


@pytest.mark.parametrize("has, picked", [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")])
def test_precision_is_what_the_hardware_has(has, picked, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True, "bf16": False}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: picked == "bfloat16")
    for clock in ("time", "perf_counter", "monotonic", "process_time"):
        monkeypatch.setattr(time, clock, None)
    assert [train.pick_precision("cpu"), train.pick_precision("mps")] == [picked, "float32"]
    assert train.pick_precision("cuda") == ("bfloat16" if picked == "bfloat16" else "float16")
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # before PyTorch 2.9
    assert train.pick_precision("cpu") == "float32"


@pytest.mark.parametrize("precision, fused", [("bfloat16", False), ("float32", True)])
def test_attention_in_bfloat16_is_plain_on_a_cpu(micro, precision, fused):
    args = train.parse_args(["--run", str(micro), "--device", "cpu", "--precision", precision])
    run = train.Run(args, dict(train=None, test=None))
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with run.autocast():
        attended = nn.functional.scaled_dot_product_attention(q, q, q)
    names, nodes = set(), [attended.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert any("Flash" in name for name in names) == fused
    assert train.plain_attention("cuda", "bfloat16") is False
