"""The losses of train.py, each with a fake network that knows the answer, so that the loss is known too."""
import shutil

import pytest
import torch
from torch import nn

import train
from wuerstchen import PRESETS, SemanticCompressor, alpha_bar, shrink

ROWS = 4000  # for shares of rows; the standard deviation of a share of 25 % is then 0.7 %


# Text: the first B captions are the images' own, the others are hard negatives.


def test_text_loss_knows_own_captions_from_hard_negatives():
    ids = torch.tensor([[1, 2], [3, 4], [1, 3], [1, 2]])  # caption 2 is a hard negative; 3 happens to be caption 0
    images, mask, logits = torch.rand(2, 8, 8, 3), ids > 0, torch.randn(2, 4)
    asked = []

    def clip(*inputs):
        asked.append(inputs)
        return logits
    loss = train.text_loss(clip, images, ids, mask)
    assert asked[0][0] is images and asked[0][1] is ids and asked[0][2] is mask
    rows, columns = logits.log_softmax(dim=1), logits[:, :2].log_softmax(dim=0)
    per_image = -((rows[0, 0] + rows[0, 3]) / 2 + rows[1, 1]) / 2
    per_caption = -(columns[0, 0] + columns[1, 1]) / 2
    torch.testing.assert_close(loss, (per_image + per_caption) / 2)


# Stage A


class Scaled(nn.Module):
    """A VQGAN that gives back the images times `w`."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(-0.9))

    def forward(self, images):
        return self.w * images, self.w * images[:, ::4, ::4], "codes", 0.3 * self.w


class Mean(nn.Module):
    """A discriminator: `v` times each image's mean."""

    def __init__(self):
        super().__init__()
        self.v, self.calls = nn.Parameter(torch.tensor(3.0)), 0

    def forward(self, images):
        self.calls += 1
        return self.v * images.mean(dim=(1, 2, 3))


MEANS = torch.tensor([0.2, 0.3, 0.8])  # D: 0.6, 0.9 and 2.4 for the images, -0.54, -0.81 and -2.16 for what A gives


@pytest.mark.parametrize("adversarial", [False, True])
def test_vqgan_loss(adversarial):
    a, d = Scaled(), Mean()
    images = MEANS.view(3, 1, 1, 1).expand(3, 8, 8, 3)
    loss_gen, loss_disc, mse, latents, codes = train.vqgan_loss(a, d, images, adversarial)
    square, mean = MEANS.square().mean(), MEANS.mean()
    torch.testing.assert_close(mse, 1.9 ** 2 * square)
    expected = 10 * 1.9 ** 2 * square + 1.9 * mean - 0.3 * 0.9
    if adversarial:
        expected -= 0.005 * 3 * -0.9 * mean
        hinge = (0.4 + 0.1 + 0) / 3 + (0.46 + 0.19 + 0) / 3
        torch.testing.assert_close(loss_disc, torch.tensor(hinge))
    else:
        assert loss_disc == 0 and d.calls == 0
    torch.testing.assert_close(loss_gen, expected)
    assert not latents.requires_grad and codes == "codes"
    # The generator learns from its loss alone, the discriminator from its own alone.
    (loss_gen + loss_disc).backward()
    of_w = -10 * 2 * 1.9 * square - mean + 0.3 - adversarial * 0.005 * 3 * mean
    torch.testing.assert_close(a.w.grad, of_w)
    if adversarial:  # two of three images are within each hinge's slope
        torch.testing.assert_close(d.v.grad, -(0.2 + 0.3) / 3 - 0.9 * torch.tensor((0.2 + 0.3) / 3))
    assert d.v.requires_grad


def test_crops_lie_on_stage_a_grid():
    y, x = torch.meshgrid(torch.arange(64), torch.arange(48), indexing="ij")
    images = torch.stack([torch.stack([y, x, torch.full_like(x, i)], dim=-1) for i in range(2)])
    corners = set()
    for _ in range(300):
        cut = train.crop(images, 32)
        top, left, _ = cut[0, 0, 0].tolist()
        assert torch.equal(cut, images[:, top:top + 32, left:left + 32]) and cut.shape == (2, 32, 32, 3)
        corners.add((top, left))
    assert corners == {(4 * i, 4 * j) for i in range(9) for j in range(5)}


def test_idle_codes_move_onto_latents():
    codebook, idle = torch.zeros(5, 4), torch.full((5,), torch.inf)
    latents = torch.rand(2, 3, 3, 4) + 1
    chosen = torch.tensor([0, 1, 2]).expand(2, 3, 3)
    rows = set(map(tuple, latents.flatten(0, 2).tolist()))
    assert train.revive_codes(codebook, latents, chosen, idle) == 2  # at first, all that were not chosen
    assert all(tuple(code) in rows for code in codebook[3:].tolist()) and not codebook[:3].any()
    placed = codebook.clone()
    for step in range(49):
        assert train.revive_codes(codebook, latents + 1, torch.full((2, 3, 3), step % 4), idle) == 0
    assert torch.equal(codebook, placed)
    assert train.revive_codes(codebook, latents + 1, torch.full((2, 3, 3), 1), idle) == 1  # 4, for 50 steps
    assert tuple((codebook[4] - 1).tolist()) in rows and torch.equal(codebook[:4], placed[:4])
    assert idle.tolist() == [1, 0, 3, 2, 0]
    idle.fill_(100)
    train.revive_codes(codebook, latents * torch.nan, chosen, idle)
    assert codebook.isfinite().all()


# Stages B and C. Of the fakes, eps_from() knows x0 and so finds eps in what it is shown, if it is noised as it should.


def eps_from(x, x0, t):
    signal = alpha_bar(t).view(-1, *[1] * (x.dim() - 1)).double()
    return ((x.double() - signal.sqrt() * x0) / (1 - signal).sqrt()).float()


class FakeB:
    def __init__(self, x0, wrong=0.0):
        self.x0, self.wrong = x0, wrong

    def __call__(self, x, t, semantic, text):
        self.x, self.t, self.semantic, self.text = x, t, semantic, text
        return eps_from(x, self.x0, t) + self.wrong


class FakeC(FakeB):
    def normalise(self, semantic):
        return (semantic - 5) / 2

    def __call__(self, x, t, text):
        return super().__call__(x, t, None, text)


SCALE = torch.tensor(0.4)
TEXT, NULL = torch.ones(ROWS, 3, 2), torch.full((1, 3, 2), -1.0)


class Compressor(nn.Module):
    """Semantic latents (B, 1, 1, 16): `w` times the image's first value."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(100.0))

    def forward(self, small):
        return (self.w * small[:, :1, :1, :1]).expand(-1, 1, 1, 16)


def loss_b(b, compressor=None, latents=torch.full((ROWS, 2, 2, 4), 0.2)):
    small = torch.linspace(1, 2, ROWS).view(-1, 1, 1, 1).expand(-1, 3, 3, 3)
    return train.stage_b_loss(b, compressor or Compressor(), SCALE, small, latents, TEXT, NULL)


def loss_c(c, semantic=torch.full((ROWS, 2, 2, 16), 8.0)):
    return train.stage_c_loss(c, semantic, TEXT, NULL)


@pytest.mark.parametrize("fake, x0, loss_of", [(FakeB, 0.5, loss_b), (FakeC, 1.5, loss_c)])
def test_diffusion_losses(fake, x0, loss_of):
    """x0: latents 0.2 / 0.4 for B, (8 - 5) / 2 for C. A network that finds all of eps has no loss; one that is wrong
    by 1 has the weight 1 - alpha_bar(t), averaged over its own times."""
    assert loss_of(fake(x0)) < 1e-6
    off = fake(x0, wrong=1.0)
    torch.testing.assert_close(loss_of(off).detach(), (1 - alpha_bar(off.t)).mean())
    assert off.t.min() < 0.01 and 0.05 < (off.t == 1).float().mean() < 0.1
    eps = eps_from(off.x, x0, off.t)
    assert abs(eps.mean()) < 0.02 and 0.98 < eps.std() < 1.02
    assert len(set(eps[:, 0, 0, 0].tolist())) > 0.99 * ROWS  # each row has its own


@pytest.mark.parametrize("fake, x0, loss_of, share", [(FakeB, 0.5, loss_b, 0.25), (FakeC, 1.5, loss_c, 0.05)])
def test_share_of_dropped_captions(fake, x0, loss_of, share):
    network = fake(x0)
    loss_of(network)
    dropped = (network.text == NULL).all(dim=(1, 2))
    assert (network.text[~dropped] == 1).all() and abs(dropped.float().mean() - share) < 0.02


def test_stage_b_drops_and_noises_semantic_latents():
    b, compressor = FakeB(0.5), Compressor()
    loss_b(b, compressor)
    clean = 100 * torch.linspace(1, 2, ROWS)
    relative = b.semantic[:, 0, 0].detach() / clean[:, None]
    zero = (relative == 0).all(dim=1)
    noised = ~zero & ((relative - 1).abs() > 1e-4).any(dim=1)
    dropped = (b.text == NULL).all(dim=(1, 2))
    assert abs(zero.float().mean() - 0.05) < 0.015 and abs(zero[dropped].float().mean() - 0.05) < 0.03
    assert not noised[dropped].any()  # without a caption, the semantic latents are exact
    assert abs(noised[~dropped & ~zero].float().mean() - 0.3) < 0.03
    # They are noised to times in [0, 0.5]: the signal's share falls to the root of alpha_bar(0.5), by about 0.01.
    signal, least = relative[noised], alpha_bar(torch.tensor(0.5)).sqrt()
    assert least - 0.03 < signal.min() < least + 0.01 and signal.max() > 0.99
    t = torch.rand(100_000) / 2
    assert abs(signal.mean() - alpha_bar(t).sqrt().mean()) < 0.01
    noise = (relative - relative.mean(dim=1, keepdim=True))[noised] * clean[noised, None]
    assert abs(noise.square().mean() * 16 / 15 - (1 - alpha_bar(t)).mean()) < 0.03


def test_the_compressor_learns_from_stage_b():
    compressor = Compressor()

    def b(x, t, semantic, text):
        return x + semantic.mean(dim=(1, 2, 3))[:, None, None, None] / 100
    loss_b(b, compressor).backward()
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


# What the stages hand their losses.


class Captured(Exception):
    pass


@pytest.fixture
def captured(run, tmp_path, monkeypatch):
    """captured(stage, name): begins a stage -> its Run, what it calls `fit` with, and a list to which its loss function
    adds the arguments of the loss train.<name>"""
    def begin(stage, name, *options):
        found, calls = [], []

        def fit(run, stage, network, batches, loss_fn, preview, lr_scale=lambda name: 1, muon=True):
            found.append((run, network, next(batches(0, run.recipe(stage))), loss_fn, lr_scale))
            raise Captured

        def loss(*args, **options):
            calls.append([*args, *options.values()])
            return torch.tensor(1.0), torch.tensor(2.0), 0, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1).long()
        folder = shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
        monkeypatch.setattr(train, "fit", fit)
        monkeypatch.setattr(train, name, loss)
        with pytest.raises(Captured):
            train.main([stage, "--run", str(folder), "--steps", "20", "--batch-size", "16", "--cache", "64", *options])
        return *found[0], calls
    return begin


def test_the_text_stage_puts_hard_negatives_last(captured):
    run, clip, batch, loss_fn, _, calls = captured("text", "text_loss")
    for step in (0, 0, 1):
        loss_fn(clip, batch, step)
    first, same, other = (ids for _, _, ids, _ in calls)
    own = run.tokens(batch[1])[0]
    assert calls[0][0] is clip and calls[0][1] is batch[0] and len(first) > 20
    for ids in (first, same, other):
        assert torch.equal(ids[:16], own) and not (ids[16:, None] == own).all(dim=2).all(dim=1).any()
    assert torch.equal(first, same) and not torch.equal(first[16:], other[16:len(first)])
    assert clip.image is run.model.compressor.backbone  # Stage B's compressor starts from it


def test_stage_a_is_adversarial_in_its_last_quarter(captured):
    run, network, batch, loss_fn, lr_scale, calls = captured("a", "vqgan_loss")
    logged = [loss_fn(network, batch, step) for step in (0, 14, 15, 19)]
    assert [call[3] for call in calls] == [False, False, True, True]
    assert calls[0][2].shape == (16, 32, 32, 3) and calls[0][:2] == [network["a"], network["discriminator"]]
    assert all(loss == 3 and numbers["loss"] == 1 and numbers["loss_disc"] == 2 for loss, numbers in logged)
    assert [numbers["revived_codes"] for _, numbers in logged] == [255, 0, 0, 0]
    assert lr_scale("a.quantizer.codebook") == 5 and lr_scale("a.to_pixels.weight") == 1


@torch.no_grad()
def test_stage_b_gets_latents_and_text(captured):
    run, network, batch, loss_fn, lr_scale, calls = captured("b", "stage_b_loss", "--precision", "float32")
    loss_fn(network, batch, 0)
    b, compressor, scale, small, latents, text, null_text = calls[0]
    assert b is network["b"] and compressor is network["compressor"] and scale is run.model.a.scale
    images, captions = next(run.batches(0, train.Recipe(1, 64, 0)))
    encoded = run.model.a.encode(images)
    rows = [(encoded - row).abs().sum(dim=(1, 2, 3)).argmin().item() for row in latents]
    assert len(set(rows)) > 8
    torch.testing.assert_close(latents, encoded[rows], atol=2e-3, rtol=2e-3)  # kept in half precision
    torch.testing.assert_close(small, shrink(images[rows]).clamp(0, 1), atol=0.003, rtol=0)
    torch.testing.assert_close(text, run.model.encode_text([captions[i] for i in rows], "b"), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(null_text, run.model.encode_text([""], "b"))
    assert lr_scale("compressor.norm.weight") == 0.2 and lr_scale("b.out.weight") == 1


@pytest.mark.parametrize("options", [[], ["--freeze-text"]])
def test_stage_c_gets_semantic_latents_and_text(captured, options):
    run, network, batch, loss_fn, lr_scale, calls = captured("c", "stage_c_loss", "--precision", "float32", *options)
    loss_fn(network, batch, 0)
    c, semantic, text, null_text = calls[0]
    assert c is network["c"] and ("text" in network) == text.requires_grad == null_text.requires_grad == (not options)
    images, captions = next(run.batches(0, train.Recipe(1, 64, 0)))
    with torch.no_grad():
        compressed = run.model.compress(images)
        rows = [(compressed - row).abs().sum(dim=(1, 2, 3)).argmin().item() for row in semantic]
        torch.testing.assert_close(semantic, compressed[rows], atol=1e-4, rtol=1e-4)
        expected = run.model.encode_text([captions[i] for i in rows], "b")  # C's text encoder starts as B's
        torch.testing.assert_close(text, expected, atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(null_text, run.model.encode_text([""], "b"))
    normal = c.normalise(compressed)
    torch.testing.assert_close(normal.mean(dim=(0, 1, 2)), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(normal.std(dim=(0, 1, 2), correction=0), torch.ones(16), atol=1e-2, rtol=0)
    assert run.model.text is not run.model.text_b
    assert lr_scale("text.norm.weight") == 0.1 and lr_scale("c.out.weight") == 1
