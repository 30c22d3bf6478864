"""What a training run survives: signals, kills, full disks, numbers that are not finite; and several processes."""
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import distributed

import train
import wuerstchen
from conftest import HERE, metrics, run_script
from test_data import folder_of
from wuerstchen import PRESETS, STAGES, Wuerstchen

FEW = ["--steps", "7", "--batch-size", "4", "--cache", "32", "--save-every", "3", "--precision", "float32"]


def copy_of(run, folder, without=None):
    """A run of one's own to train in, with one stage unfinished."""
    shutil.copytree(run, folder)
    if without:
        (folder / f"{without}.pt").unlink()
    return folder


def die_in_step(at, command, monkeypatch):
    """Trains until the step after `at`, and ends there without a chance to save."""
    update_average = train.update_average

    def die(average, network, step):
        if step == at:
            raise RuntimeError("killed")
        update_average(average, network, step)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(train, "update_average", die)
        train.main(command)


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


@torch.no_grad()
def test_the_mapper_begins_with_the_principal_components():
    torch.manual_seed(0)
    compressor = wuerstchen.SemanticCompressor(PRESETS["tiny"].compressor).eval()
    small = torch.stack([torch.from_numpy(train.Shapes(96)[i][0]) for i in range(40)])
    train.begin_mapper(compressor, small.split(16))
    features = compressor.backbone(small / 255).flatten(0, 2)
    kept = torch.cov((features @ compressor.mapper.weight.T).T)
    largest = torch.linalg.svdvals(features - features.mean(dim=0))[:16].square() / (len(features) - 1)
    assert torch.allclose(kept, largest.flip(0).diag(), atol=1e-4 * largest[0].item())  # and nothing twice


@pytest.mark.parametrize("half, single, picked", [(1, 4, "bfloat16"), (4, 1, "float32"), (9, 10, "float32")])
def test_a_busy_machine_picks_the_same_precision(monkeypatch, half, single, picked):
    clock, taken = [0], []

    def perf_counter():  # called before and after each product, the two kinds in turns; most of them are disturbed
        if len(taken) % 2:
            clock[0] += (half, single)[len(taken) // 2 % 2] + (0 if len(taken) > 180 else 10 * (len(taken) % 3))
        taken.append(clock[0])
        return clock[0]
    monkeypatch.setattr(train.time, "perf_counter", perf_counter)
    assert train.pick_precision("cpu") == picked and len(taken) == 200


def test_muon_is_torchs():
    """All matrices of a shape at once do what torch.optim.Muon does to each; wide, tall and square ones."""
    shapes = [(64, 64), (64, 64), (128, 64), (64, 192), (64, 192)]
    ours, theirs = ([torch.randn(shape, generator=torch.Generator().manual_seed(i)).requires_grad_()
                     for i, shape in enumerate(shapes)] for _ in range(2))
    muon = train.Muon([dict(params=ours, lr=0.05)])
    reference = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in ours]
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
    for p, q, first in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (q - first).norm()
    values = torch.linalg.svdvals(train.orthogonal(torch.randn(1, 64, 192)))
    assert 0.6 < values.min() and values.max() < 1.3


def fit_a_line(run, tmp_path, options, loss_of):
    """`fit` for a network of one Linear, the same batches and first weights in every test."""
    folder = copy_of(run, tmp_path / f"run{len(list(tmp_path.iterdir()))}")
    args = train.parse_args(["c", "--run", str(folder), *FEW, "--batch-size", "8", *options])
    for name, value in train.read_options(folder).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.device = "cpu"
    torch.manual_seed(0)
    network = torch.nn.Linear(5, 3)
    batches = lambda first, recipe: ([torch.randn(8, 5, generator=torch.Generator().manual_seed(step))]
                                     for step in range(first, recipe.steps))
    return train.fit(train.Run(args), "c", network, batches, loss_of, lambda average, step: None), folder


def test_float16_learns_with_scaled_gradients(run, tmp_path):
    """What gives float16 a gradient out of its range is skipped, and the scale halved until it fits."""
    loss_of = lambda network, batch, step: ((100 * network(batch[0])).float().sum() / 8, {})
    half, folder = fit_a_line(run, tmp_path, ["--precision", "float16"], loss_of)
    skipped = [row["step"] for row in metrics(folder) if "not_finite" in row]
    assert 0 < len(skipped) < 7 and skipped == list(range(1, len(skipped) + 1))
    full, folder = fit_a_line(run, tmp_path, [], loss_of)
    assert not [row for row in metrics(folder) if "not_finite" in row]
    assert half.weight.isfinite().all() and not torch.equal(half.weight, full.weight)


@pytest.mark.parametrize("stage", ["a", "c"])
def test_recomputed_activations_give_the_same_weights(run, tmp_path, stage):
    ends = []
    for options in ([], ["--recompute"]):
        folder = copy_of(run, tmp_path / f"run{len(options)}", stage)
        train.main([stage, "--run", str(folder), *FEW, *options])
        ends.append(torch.load(folder / f"{stage}.pt")[stage])
    for name, x in ends[0].items():
        torch.testing.assert_close(x, ends[1][name], msg=name)


def test_a_frozen_text_encoder_is_read_once(run, tmp_path):
    folder = copy_of(run, tmp_path / "run", "c")
    train.main(["c", "--run", str(folder), *FEW, "--freeze-text"])
    old, new = Wuerstchen.load(run), Wuerstchen.load(folder)
    for (name, x), y, of_b in zip(old.text.state_dict().items(), new.text.state_dict().values(),
                                  old.text_b.state_dict().values()):
        assert torch.equal(y, of_b), name
    assert not torch.equal(old.c.out.weight, new.c.out.weight)
    kept = json.loads((folder / "semantic" / "made_of.json").read_text())["arrays"]
    assert set(kept) == {"semantic", "text"} and kept["text"] == ["float16", [64, 24, 128]]


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


def test_a_signal_in_the_last_step_stops_too(run, tmp_path, monkeypatch, capsys):
    """While the last sheet is drawn, say. The next command says that its steps are others, and only finishes."""
    folder, make_sheet = copy_of(run, tmp_path / "run", "c"), train.make_sheet

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return make_sheet(*args)

    monkeypatch.setattr(train, "make_sheet", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main(["c", "--run", str(folder), *FEW])
    assert stopped.value.code == 143 and "after step 7 of 7" in capsys.readouterr().err
    assert not (folder / "c.pt").exists()
    train.main(["c", "--run", str(folder), *FEW, "--lr", "1e-4"])
    out = capsys.readouterr().out
    assert "going on from step 7" in out and "begun with --steps 7 --batch-size 4 --lr 0.0015, now with" in out
    assert (folder / "c.pt").exists()


@pytest.mark.parametrize("stage", ["text", "a", "b", "c"])
def test_a_killed_run_that_goes_on_ends_in_the_same_weights(run, tmp_path, stage, monkeypatch):
    def command(folder):
        return [stage, "--run", str(folder), *FEW]

    def go(folder):
        train.main(command(folder))
        return torch.load(folder / f"{stage}.pt", weights_only=True)

    whole, killed = go(copy_of(run, tmp_path / "whole", stage)), copy_of(run, tmp_path / "killed", stage)
    for last in (4, 5):  # dies twice after the checkpoint of step 3
        die_in_step(last, command(killed), monkeypatch)
    again = go(killed)
    for network in whole:
        for name in whole[network]:
            assert torch.equal(whole[network][name], again[network][name]), f"{network}.{name}"


def train_quietly(command):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    train.main(command)


def test_thirty_kills_at_random_times(run, tmp_path):
    """Whenever the kill comes, the checkpoint can be read and is no older than before. Saves after every step, so that
    many kills hit one."""
    folder, rng = copy_of(run, tmp_path / "run", "text"), random.Random(0)
    path, new = folder / "text.ckpt", folder / "text.ckpt.new"
    command = ["text", "--run", str(folder), "--steps", "100000", "--batch-size", "2", "--save-every", "1"]
    context = multiprocessing.get_context("forkserver")  # imports torch once, not thirty times
    context.set_forkserver_preload(["train"])
    last, in_a_save = 0, 0
    for kill in range(32):
        saved = path.stat().st_mtime_ns if path.exists() else 0
        new.unlink(missing_ok=True)  # of the kill before
        process = context.Process(target=train_quietly, args=(command,))
        process.start()
        if kill >= 4:  # not while it starts: after a save
            while not (path.exists() and path.stat().st_mtime_ns > saved):
                time.sleep(0.001)
        if kill % 2:  # in the middle of one
            while not new.exists():
                time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02 if kill % 2 else 1))
        assert process.is_alive()
        process.kill()
        process.join()
        in_a_save += new.exists()
        if path.exists():
            step = train.read_checkpoint(path, "tiny", "cpu")["step"]
            assert step >= last
            last = step
    print(f"32 kills, {in_a_save} in the middle of a save, step {last} reached")
    assert in_a_save >= 5 and last >= 28
    train.main([*command, "--steps", str(last + 2)])
    assert (folder / "text.pt").exists() and not path.exists()


def test_a_second_process_is_refused(run, tmp_path):
    folder = copy_of(run, tmp_path / "run", "text")
    held = train.lock(folder)
    done = run_script("train.py", "text", "--run", folder, *FEW)
    assert done.returncode == 1 and done.stderr.strip().endswith(f"{folder} is in use by another process")
    held.close()
    assert run_script("train.py", "text", "--run", folder, *FEW).returncode == 0


def test_a_full_disk_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path / "run", "text")
    command = ["text", "--run", str(folder), *FEW]
    die_in_step(4, command, monkeypatch)
    before = (folder / "text.ckpt").read_bytes()
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    done = run_script("train.py", *command, preexec_fn=full)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "text.ckpt can't be written; the one before is kept" in done.stderr.splitlines()[-1]
    assert (folder / "text.ckpt").read_bytes() == before and not (folder / "text.ckpt.new").exists()
    assert "going on from step 3" in run_script("train.py", *command).stdout


def test_a_full_disk_while_latents_are_written(run, tmp_path):
    folder = copy_of(run, tmp_path / "run", "b")
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    done = run_script("train.py", "b", "--run", folder, *FEW, preexec_fn=full)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "File too large" in done.stderr
    assert not (folder / "latents" / "made_of.json").exists()
    assert run_script("train.py", "b", "--run", folder, *FEW).returncode == 0


@pytest.mark.parametrize("stage", ["text", "a", "b", "c"])
def test_a_step_that_is_not_finite_is_skipped(run, tmp_path, stage, monkeypatch, capsys):
    """What comes out of one function is spoiled in two steps; nothing of it may stay, in weights or statistics."""
    folder = copy_of(run, tmp_path / "run", stage)
    name = {"text": "shrink", "a": "crop", "b": "add_noise", "c": "add_noise"}[stage]
    where = wuerstchen if stage == "text" else train
    whole, calls = getattr(where, name), []

    def spoiled(x, *rest):
        calls.append(0)
        return whole(x, *rest) * (math.nan if len(calls) in (3, 5) else 1)

    monkeypatch.setattr(where, name, spoiled)
    train.main([stage, "--run", str(folder), *FEW])
    rows = [row for row in metrics(folder) if "not_finite" in row]
    assert len(rows) == 2 and rows[-1]["not_finite"] == 2 and rows[0]["stage"] == stage
    assert f"stage {stage}: 2 steps without a finite loss" in capsys.readouterr().out
    for network in torch.load(folder / f"{stage}.pt", weights_only=True).values():
        assert all(x.isfinite().all() for x in network.values())


def test_ten_such_steps_in_a_row_stop_training(run, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path / "run", "c")
    whole, calls = train.diffusion_loss, []

    def spoiled(*args):
        calls.append(0)
        return whole(*args) * (math.inf if len(calls) > 5 else 1)

    monkeypatch.setattr(train, "diffusion_loss", spoiled)
    with pytest.raises(ValueError, match="ten steps in a row.*up to step 15; .*c.ckpt holds the last good state"):
        train.main(["c", "--run", str(folder), *FEW, "--steps", "40"])
    assert train.read_checkpoint(folder / "c.ckpt", "tiny", "cpu")["step"] == 3
    assert metrics(folder)[-1]["not_finite"] == 10 and not (folder / "c.pt").exists()


def test_checkpoints_of_another_kind_are_named(run, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path / "run", "c")
    command = ["c", "--run", str(folder), *FEW]
    die_in_step(4, command, monkeypatch)
    path = folder / "c.ckpt"
    state = torch.load(path, weights_only=True)
    for changed, message in (({"layout": 0}, "another layout"), ({"preset": "small"}, "of preset small, not tiny")):
        torch.save(state | changed, path)
        with pytest.raises(ValueError, match=message):
            train.main(command)
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(ValueError, match="is damaged"):
        train.main(command)
    for spoil in (lambda x: x[:10_000], lambda x: b""):
        (folder / "a.pt").write_bytes(spoil((run / "a.pt").read_bytes()))
        with pytest.raises(ValueError, match="a.pt is damaged, or of another preset"):
            train.main(command)
    config = json.loads((folder / "config.json").read_text())
    config["a"]["channels"] = [16, 32]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "a.pt").write_bytes((run / "a.pt").read_bytes())
    with pytest.raises(ValueError, match="a.pt is damaged, or of another preset or an older layout"):
        train.main(command)


def test_a_batch_in_parts_is_the_same_batch(run, tmp_path):
    loss_of = lambda network, batch, step: (network(batch[0]).square().mean(), {})
    whole, parts = (fit_a_line(run, tmp_path, ["--accumulate", n], loss_of)[0] for n in "14")
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="can't be split into 3 equal parts"):
        fit_a_line(run, tmp_path, ["--accumulate", "3"], loss_of)


# Fine-tuning


@pytest.mark.parametrize("stage", ["text", "a", "b", "c"])
def test_a_stage_goes_on_from_given_weights(run, tmp_path, stage):
    """At a learning rate next to 0, what is trained stays what was given, at another size too."""
    folder = tmp_path / "fine"
    train.main([stage, "--run", str(folder), "--init-from", str(run), "--image-size", "96", "--steps", "2",
                "--batch-size", "4", "--cache", "16", "--lr", "1e-9"])
    given, fine = Wuerstchen.load(run), Wuerstchen.load(folder)
    assert fine.config.image_size == 96 and fine.config.cells == 3 and given.config.cells == 2
    for name, x in given.state_dict().items():
        y = fine.state_dict()[name]
        if not any(part in name for part in ("running", "num_batches", "codebook", "a.scale", "c.latent")):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4, msg=name)
    assert fine.generate(["a red star"], steps_c=1, steps_b=1).shape == (1, 96, 96, 3)
    for options, message in ((["--run", folder, "--init-from", folder], "was begun with --init-from"),
                             (["--run", run, "--init-from", folder], "was begun without --init-from"),
                             (["--run", tmp_path / "x", "--init-from", run, "--preset", "small"], "of preset tiny")):
        with pytest.raises(ValueError, match=message):
            train.main([stage, *map(str, options)])


def test_a_stage_without_given_weights_begins_anew(run, tmp_path):
    folder = tmp_path / "fine"
    command = ["c", "--run", str(folder), "--init-from", str(run), "--steps", "1", "--batch-size", "4", "--lr", "1e-9",
               "--cache", "16"]
    train.main(command)
    (folder / "c.pt").unlink()
    train.main(command)
    first, again = (Wuerstchen.load(place).c.blocks[0].expand.weight for place in (run, folder))
    assert not torch.allclose(first, again, atol=1e-3)


def test_init_from_needs_a_stage_and_a_run(tmp_path):
    assert "needs the stage" in run_script("train.py", "--init-from", "x", "--run", tmp_path / "x").stderr
    done = run_script("train.py", "c", "--init-from", tmp_path, "--run", tmp_path / "x")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "config.json" in done.stderr


# Several processes


class Halves:
    """Random functions whose rows depend on their place in the whole batch, however many processes share it."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks, self.calls = rank, ranks, 0

    def rows(self, draw, shape):
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        if not shape or shape[0] == ():  # one for all
            return draw((), generator)
        n = shape[0]
        return draw((n * self.ranks, *shape[1:]), generator)[self.rank * n:][:n]

    def rand(self, *shape, device=None):
        return self.rows(lambda shape, g: torch.empty(shape).uniform_(generator=g), shape)

    def randn_like(self, x):
        return self.rows(lambda shape, g: torch.empty(shape).normal_(generator=g), x.shape)


class Captured(Exception):
    pass


def gradients(rank, ranks, folder, stage, out):
    """In a process of its own: the gradients of one stage's own loss at its first batch of 16, with its BatchNorms and
    all, averaged over the processes."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    if ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{out}.group", rank=rank, world_size=ranks)
    args = train.parse_args([stage, "--run", str(folder), "--batch-size", "16", "--cache", "64", "--precision",
                             "float32"])
    options = train.read_options(folder)
    for name in ("preset", "data", "image_size", "seed", "crop", "flip"):
        setattr(args, name, options[name])
    args.device = "cpu"
    confuse = train.Shapes.confuse
    first = type("First", (), {"choice": lambda self, ways: ways[0], "integers": lambda self, n: 0})()
    train.Shapes.confuse = lambda self, caption, rng: confuse(self, caption, first)
    torch.manual_seed(0)
    run = train.Run(args)
    run.take(Wuerstchen.load(folder, train.NEEDS[stage]), given=False)

    def capture(run, stage, network, batches, loss_of, *rest, **options):
        draws = Halves(rank, ranks)
        network.train()
        if "idle" in dict(network.named_buffers()):
            network.idle.zero_()  # the first batch would place the codes at random
            with torch.no_grad():
                network["a"].quantizer.codebook.normal_(generator=torch.Generator().manual_seed(0))
        batch = next(iter(batches(0, run.recipe(stage))))
        objective = train.Objective(network, loss_of)
        if ranks > 1:
            for module in network.modules():
                if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                    train.share_statistics(module)
            objective = train.DistributedDataParallel(objective, find_unused_parameters=stage == "a")
        torch.rand, torch.randn_like = draws.rand, draws.randn_like
        generator = torch.Generator().manual_seed(1)
        torch.randint = lambda high, shape, device=None: torch.zeros(shape, dtype=torch.long)
        loss, _ = objective(batch, 10_000)  # late: Stage A's discriminator has joined
        loss.backward()
        if rank == 0:
            found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
            found |= {name: x.clone() for name, x in network.named_buffers() if "running" in name}
            torch.save(found, out)
        raise Captured

    train.fit = capture
    try:
        train.TRAIN[stage](run)
    except Captured:
        pass
    if ranks > 1:
        distributed.destroy_process_group()


@pytest.mark.parametrize("stage", ["text", "a", "b", "c"])
def test_two_processes_of_eight_are_one_of_sixteen(run, tmp_path, stage):
    found = []
    for ranks in (1, 2):
        folder, out = copy_of(run, tmp_path / f"run{ranks}"), str(tmp_path / f"gradients{ranks}")
        shutil.rmtree(folder / "semantic", ignore_errors=True)
        torch.multiprocessing.spawn(gradients, (ranks, folder, stage, out), nprocs=ranks)
        found.append(torch.load(out, weights_only=True))
    one, two = found
    assert one.keys() == two.keys() and len(one) > 20
    largest = max(x.abs().max() for name, x in one.items() if "running" not in name)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=3e-4 * max(1, largest), msg=name)


def torchrun(*command):
    """The command with two processes."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             *map(str, command)], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_train_every_stage(tmp_path):
    folder_of(tmp_path / "data", 40)
    (tmp_path / "data" / "p001.png").write_bytes(b"bad")
    folder = tmp_path / "run"
    process = torchrun("train.py", "--run-dir", folder, "--data", "folder", "--data-dir", tmp_path / "data",
                       "--image-size", "32", "--steps", "3", "--batch-size", "8", "--accumulate", "2", "--cache", "64",
                       "--log-every", "1")
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    rows = metrics(folder)
    for stage in STAGES:
        assert (folder / f"{stage}.pt").exists()
        assert [row["step"] for row in rows if row.get("stage") == stage and "loss" in row] == [1, 2, 3]
    assert out.count("done in") == 1 and out.count("stage A: PSNR") == 1 and "can't be used: 1 pictures" in out
    assert Wuerstchen.load(folder).generate(["a"], steps_c=1, steps_b=1).isfinite().all()


def test_a_killed_process_ends_the_job_and_the_job_goes_on(run, tmp_path):
    folder = copy_of(run, tmp_path / "run", "text")
    before = len(metrics(folder))
    command = ("train.py", "text", "--run-dir", folder, "--batch-size", "4", "--log-every", "1", "--save-every", "2")
    process = torchrun(*command, "--steps", "2000")
    deadline = time.time() + 90
    while not (folder / "text.ckpt").exists() and time.time() < deadline:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "goes on from the last checkpoint" in errors or "SIGKILL" in errors.upper()
    step = train.read_checkpoint(folder / "text.ckpt", "tiny", "cpu")["step"]
    process = torchrun(*command, "--steps", str(step + 4))
    out, errors = process.communicate(timeout=90)
    assert process.returncode == 0 and f"going on from step {step}" in out, errors
    assert (folder / "text.pt").exists() and len(metrics(folder)) > before
