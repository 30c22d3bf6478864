"""The losses of train.py, each with a fake network whose answer is known, and what the stages pass to them."""
import functools
import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train
from wuerstchen import PRESETS, SemanticCompressor, alpha_bar, rescaled


def test_hard_negatives_by_hand(monkeypatch):
    between = train.words_between(["A red dog and a blue cat", "a blue dog", "a red cat and the sun"])
    assert between["a", "dog"] == between["a", "cat"] == {"red", "blue"} and between["", "red"] == {"a"}
    assert between["red", "and"] == between["blue", ""] == {"dog", "cat"} and len(between) == 11

    def found(caption):
        return {tuple(train.hard_negatives(caption, between, np.random.default_rng(seed))) for seed in range(100)}
    monkeypatch.setattr(train, "reserved", lambda caption: caption == "a red dog and a blue dog")
    replaced = ["a blue dog and a blue cat", "a red cat and a blue cat", "a red dog and a red cat", None]
    swapped = ["a blue dog and a red cat", "a red cat and a blue dog"]
    expected = {tuple(filter(None, both)) for both in itertools.product(replaced, swapped)}
    assert found("A red dog and a blue cat") == expected == found("a red dog and a blue cat")
    assert found("a green dog") == {("a red dog",), ("a blue dog",)} and found("the sun") == {()}


def test_hard_negatives_change_only_words_that_are_read():
    captions = [" ".join(f"w{i % 7}" for i in range(start, start + 3000)) for start in range(7)]
    tokenizer = train.Tokenizer.train(captions, 20, length=8)
    assert len(tokenizer.encode("w1")) == 2 and tokenizer.length == 8
    assert train.words_read("w1  w2 w3", tokenizer) == "w1  w2 w3"
    assert train.words_read("w1 w2 w3 w4", tokenizer) == train.words_read(captions[1], tokenizer) == "w1 w2 w3"
    assert train.words_read(" ".join(captions), tokenizer) == "w0 w1 w2" and train.words_read("", tokenizer) == ""
    assert train.words_read("w1" * 9000, tokenizer) == ""
    between = train.words_between(["w1 w5 w3", "w1 w2 w3"])
    read = train.words_read(captions[1], tokenizer)
    wrong, = {tuple(train.hard_negatives(read, between, np.random.default_rng(seed))) for seed in range(9)}
    ids, _ = tokenizer([captions[1], *wrong])
    assert wrong == ("w1 w5 w3",) and not torch.equal(*ids)


class Scaled(nn.Module):
    """A VQGAN that returns w = -0.9 times the images, or a discriminator: w = 3 times each image's mean."""

    def __init__(self, w):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.tensor(w)), 0

    def forward(self, images):
        self.calls += 1
        if self.w > 0:
            return self.w * images.mean(dim=(1, 2, 3))
        return self.w * images, self.w * images[:, ::4, ::4], "codes", 0.3 * self.w


@pytest.mark.parametrize("adversarial", [False, True])
def test_vqgan_loss(adversarial):
    means = torch.tensor([0.2, 0.3, 0.8])  # D: 0.6, 0.9, 2.4 for the images; -0.54, -0.81, -2.16 for what A gives
    a, d, images = Scaled(-0.9), Scaled(3.0), means.view(3, 1, 1, 1).expand(3, 8, 8, 3)
    loss_gen, loss_disc, mse, latents, codes = train.vqgan_loss(a, d, images, adversarial)
    square, mean = means.square().mean(), means.mean()
    torch.testing.assert_close(mse, 1.9 ** 2 * square)
    torch.testing.assert_close(loss_gen, 10 * 1.9 ** 2 * square + 1.9 * mean - 0.27 + adversarial * 0.0135 * mean)
    hinge = (0.4 + 0.1 + 0) / 3 + (0.46 + 0.19 + 0) / 3
    torch.testing.assert_close(loss_disc, torch.tensor(hinge if adversarial else 0.0))
    assert not latents.requires_grad and codes == "codes" and d.calls == 3 * adversarial
    (loss_gen + loss_disc).backward()  # A learns from its own loss alone, and D from its own
    torch.testing.assert_close(a.w.grad, -38 * square - mean + 0.3 - adversarial * 0.015 * mean)
    if adversarial:  # two of three images are on the sloped part of each hinge
        torch.testing.assert_close(d.w.grad, torch.tensor(-1.9 * (0.2 + 0.3) / 3))
    assert d.w.requires_grad


def test_crops_are_aligned_to_stage_as_grid():
    y, x = torch.meshgrid(torch.arange(64), torch.arange(48), indexing="ij")
    images, corners = torch.stack([torch.stack([y, x, torch.full_like(x, i)], dim=-1) for i in range(2)]), set()
    for _ in range(300):
        cut = train.crop(images, 32)
        top, left, _ = cut[0, 0, 0].tolist()
        assert torch.equal(cut, images[:, top:top + 32, left:left + 32]) and cut.shape == (2, 32, 32, 3)
        corners.add((top, left))
    assert corners == {(4 * i, 4 * j) for i in range(9) for j in range(5)}


def test_idle_codes_move_onto_latents():
    codebook, idle, latents = torch.zeros(5, 4), torch.full((5,), torch.inf), torch.rand(2, 3, 3, 4) + 1
    chosen, known = torch.tensor([0, 1, 2]).expand(2, 3, 3), {*map(tuple, latents.flatten(0, 2).tolist())}
    assert train.revive_codes(codebook, latents, chosen, idle) == 2  # at first, all that were not chosen
    assert {*map(tuple, codebook[3:].tolist())} <= known and not codebook[:3].any()
    placed = codebook.clone()
    for step in range(49):
        assert train.revive_codes(codebook, latents + 1, torch.full((2, 3, 3), step % 4), idle) == 0
    assert torch.equal(codebook, placed)
    assert train.revive_codes(codebook, latents + 1, torch.full((2, 3, 3), 1), idle) == 1  # the last, after 50 steps
    assert tuple((codebook[4] - 1).tolist()) in known and torch.equal(codebook[:4], placed[:4])
    assert idle.tolist() == [1, 0, 3, 2, 0]
    train.revive_codes(codebook, latents * torch.nan, chosen, idle.fill_(100))
    assert codebook.isfinite().all()


# Stages B and C. Shares are measured on many ROWS: the standard deviation of a share of 25% is 0.7%.

ROWS = 4000
TEXT, NULL = torch.ones(ROWS, 3, 2), torch.full((1, 3, 2), -1.0)
SMALL = torch.linspace(1, 2, ROWS).view(-1, 1, 1, 1).expand(-1, 3, 3, 3)


class Knowing:
    """A network that knows x0, so it recovers eps from its input, if that was noised as it should be."""

    def __init__(self, x0, wrong=0.0):
        self.x0, self.wrong = x0, wrong

    def __call__(self, x, t, *conditions):
        self.t, (*self.semantic, self.text) = t, conditions
        signal = alpha_bar(t).view(-1, 1, 1, 1).double()
        self.eps = ((x.double() - signal.sqrt() * self.x0) / (1 - signal).sqrt()).float()
        return self.eps + self.wrong

    def normalise(self, semantic):
        return (semantic - 5) / 2


class Compressor(nn.Module):
    """Semantic latents (B, 1, 1, 16): 100 times the image's first value."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(100.0))

    def forward(self, resized):
        return (self.w * resized[:, :1, :1, :1]).expand(-1, 1, 1, 16)


def loss_b(b, compressor=Compressor()):
    losses, _ = train.stage_b_loss(b, compressor, torch.tensor(0.4), SMALL, torch.full((ROWS, 2, 2, 4), 0.2), TEXT,
                                   NULL)
    return losses.mean()


def loss_c(c):
    return train.stage_c_loss(c, torch.full((ROWS, 2, 2, 16), 8.0), TEXT, NULL)[0].mean()


@pytest.mark.parametrize("loss_of, x0, share", [(loss_b, 0.2 / 0.4, 0.25), (loss_c, (8 - 5) / 2, 0.05)])
def test_diffusion_losses(loss_of, x0, share):
    """A network that finds eps has a loss of 0. If it is wrong by 1, its loss is the mean of the weight 1 - alpha_bar
    at its own times; in Stage B, times the factor, which keeps the mean weight about the same."""
    right, wrong = Knowing(x0), Knowing(x0, wrong=1.0)
    assert loss_of(right) < 1e-6
    loss, signal = loss_of(wrong).detach(), alpha_bar(wrong.t)
    if loss_of is loss_b:
        torch.testing.assert_close(loss, (0.4 * (1 - signal) * (signal + 0.02) ** -0.5).mean())
    torch.testing.assert_close(loss, (1 - signal).mean(), rtol=0.02 if loss_of is loss_b else 1e-6, atol=0)
    if loss_of is loss_c:  # as `training_times` draws them
        assert wrong.t.min() < 0.01 and 0.05 < (wrong.t == 1).float().mean() < 0.1
    else:
        assert abs(wrong.t.logit().mean() - 0.5) < 0.06 and abs(wrong.t.logit().std() - 1) < 0.04
    assert abs(wrong.eps.mean()) < 0.02 and 0.98 < wrong.eps.std() < 1.02
    assert len(set(wrong.eps[:, 0, 0, 0].tolist())) > 0.99 * ROWS  # each row has its own
    dropped = (wrong.text == NULL).all(dim=(1, 2))
    assert abs(dropped.float().mean() - share) < 0.02 and (wrong.text[~dropped] == 1).all()


def test_stage_b_drops_and_noises_semantic_latents():
    b, clean, t = Knowing(0.5), 100 * SMALL[:, 0, 0, :1], torch.rand(100_000) / 2
    loss_b(b)
    relative, dropped = b.semantic[0][:, 0, 0].detach() / clean, (b.text == NULL).all(dim=(1, 2))
    zero = (relative == 0).all(dim=1)
    noised = ~zero & ((relative - 1).abs() > 1e-4).any(dim=1)
    assert abs(zero.float().mean() - 0.05) < 0.015 and abs(zero[dropped].float().mean() - 0.05) < 0.03
    assert not noised[dropped].any()  # without a caption, the semantic latents are exact
    assert abs(noised[~dropped & ~zero].float().mean() - 0.1) < 0.02
    # They are noised to times in [0, 0.5].
    signal, variance = relative[noised], relative[noised].var(dim=1) * clean[noised, 0] ** 2
    assert -0.03 < signal.min() - alpha_bar(torch.tensor(0.5)).sqrt() < 0.01 and signal.max() > 0.99
    assert abs(signal.mean() - alpha_bar(t).sqrt().mean()) < 0.01
    assert abs(variance.mean() - (1 - alpha_bar(t)).mean()) < 0.03


def test_the_compressor_learns_from_stage_b():
    compressor = Compressor()
    loss_b(lambda x, t, semantic, text: x + semantic.mean(dim=(1, 2, 3), keepdim=True) / 100, compressor).backward()
    assert compressor.w.grad.abs() > 1e-3


def test_bernoulli_mask():
    for p in (0.05, 0.7):
        mask = train.bernoulli_mask(p, torch.empty(ROWS, 5, 7))
        assert mask.shape == (ROWS, 1, 1) and mask.dtype == torch.bool and abs(mask.float().mean() - p) < 0.03


@torch.no_grad()
def test_the_mapper_starts_from_the_principal_components():
    compressor = SemanticCompressor(PRESETS["tiny"]).eval()
    images = torch.stack([torch.from_numpy(train.Shapes(64)[i][0]) for i in range(40)]) / 255
    train.init_mapper(compressor, images.split(16))
    features = compressor.backbone(images).flatten(0, 2)
    kept = torch.cov((features @ compressor.mapper.weight.T).T)
    largest = torch.linalg.svdvals(features - features.mean(dim=0))[:16].square() / (len(features) - 1)
    torch.testing.assert_close(kept, largest.flip(0).diag(), atol=1e-4 * largest[0].item(), rtol=0)


# What the stages pass to their losses


class Stopped(Exception):
    pass


@pytest.fixture
def begin(run, tmp_path, monkeypatch):
    """begin(stage, loss): runs a stage until it calls `fit` -> its run; what it passes to `fit`; `calls`: what its
    loss_fn, given a step, passes to train.<loss>; the rows of its cache; the images and captions that they come from"""
    def begin(stage, loss, *options):
        found = SimpleNamespace(calls=[])

        def fit(run, stage, network, batches, loss_fn, preview=None, test_batches=(), lr_scale=lambda name: 1):
            found.run, found.network, found.lr_scale = run, network, lr_scale
            found.batch = next(batches(0, run.recipe(stage)))
            found.loss_fn = lambda step: loss_fn(network, found.batch, step)
            raise Stopped

        def record(*args, **options):
            found.calls.append([*args, *options.values()])
            if loss == "vqgan_loss":
                return torch.tensor(1.0), torch.tensor(2.0), 0, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1).long()
            return torch.arange(16.0), torch.arange(16) / 16
        monkeypatch.setattr(train, "fit", fit)
        monkeypatch.setattr(train, loss, record)
        with pytest.raises(Stopped):
            train.main([stage, "--run", str(shutil.copytree(run, tmp_path / "run")), "--steps", "20", "--batch-size",
                        "16", "--cache", "64", "--precision", "float32", *options])
        found.images, found.captions = next(found.run.batches(0, train.Recipe(1, 64, 0)))
        found.cache = {file.stem: torch.from_numpy(np.load(file)) for file in tmp_path.glob("run/cache/*/*.npy")}
        return found
    return begin


close = functools.partial(torch.testing.assert_close, atol=5e-3, rtol=5e-3, check_dtype=False)  # for half precision


def test_the_text_stage_puts_hard_negatives_last(begin):
    stage = begin("text", "contrastive_loss")
    for step in (0, 0, 1):
        stage.loss_fn(step)
    (logits, first), (_, same), (_, other) = stage.calls
    own = stage.run.model.tokenizer(stage.batch[1])[0]
    assert logits.shape == (16, len(first)) and len(first) > 20
    for ids in (first, same, other):
        assert torch.equal(ids[:16], own) and not (ids[16:, None] == own).all(dim=2).all(dim=1).any()
    assert torch.equal(first, same) and not torch.equal(first[16:], other[16:])
    assert stage.network.image is stage.run.model.compressor.backbone  # Stage B's compressor starts from it


def test_stage_a_is_adversarial_in_its_last_quarter(begin):
    stage = begin("a", "vqgan_loss")
    logged = [stage.loss_fn(step) for step in (0, 14, 15, 19)]
    assert [adversarial for *_, adversarial in stage.calls] == [False, False, True, True]
    assert stage.calls[0][:2] == [stage.network["a"], stage.network["discriminator"]]
    assert stage.calls[0][2].shape == (16, 32, 32, 3)
    assert all(loss == 3 and numbers["loss"] == 1 and numbers["loss_disc"] == 2 for loss, numbers in logged)
    assert [numbers["revived_codes"] for _, numbers in logged] == [511, 0, 0, 0]
    assert stage.lr_scale("a.quantizer.codebook") == 5 and stage.lr_scale("a.to_pixels.weight") == 1


@torch.no_grad()
def test_stage_b_gets_latents_and_text(begin):
    stage = begin("b", "stage_b_loss")
    loss, numbers = stage.loss_fn(0)
    assert loss == 7.5 and numbers == {"loss_0": 1.5, "loss_25": 5.5, "loss_50": 9.5, "loss_75": 13.5}
    b, compressor, scale, resized, latents, text, null_text = stage.calls[0]
    model, batch = stage.run.model, stage.batch
    assert b is stage.network["b"] and compressor is stage.network["compressor"] and scale is model.a.scale
    assert torch.equal(resized * 255, batch["resized"].float())
    assert torch.equal(latents, batch["latents"].float())
    close(text, model.encode_text(batch["captions"], "b"))
    close(stage.cache["latents"], model.a.encode(stage.images))
    close(stage.cache["resized"] / 255, rescaled(stage.images, 0.75).clamp(0, 1), atol=0.0021, rtol=0)  # rounded
    close(null_text, model.encode_text([""], "b"))
    assert stage.lr_scale("compressor.norm.weight") == 0.2 and stage.lr_scale("b.out.weight") == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_stage_c_gets_semantic_latents_and_text(begin, frozen):
    stage = begin("c", "stage_c_loss", *["--freeze-text"] * frozen)
    loss, numbers = stage.loss_fn(0)
    assert loss == 7.5 and numbers["loss_75"] == 13.5
    (c, semantic, text, null_text), model, batch, cache = stage.calls[0], stage.run.model, stage.batch, stage.cache
    assert c is stage.network["c"] and torch.equal(semantic, batch["semantic"])
    assert stage.network["text_c"] is model.text_c and text.requires_grad == null_text.requires_grad == (not frozen)
    with torch.no_grad():
        close(cache["semantic"], compressed := model.compress(stage.images))
        close(null_text, model.encode_text([""], "b"))  # at first, C's encoder is B's
        close(text, model.encode_text(batch["captions"], "b"))
    close(c.latent_mean, compressed.mean(dim=(0, 1, 2)), atol=1e-4)
    close(c.latent_std, compressed.std(dim=(0, 1, 2)).clip(1e-3), atol=1e-4)
    assert model.text_c is not model.text_b
    assert stage.lr_scale("text.norm.weight") == 0.1 and stage.lr_scale("c.out.weight") == 1
