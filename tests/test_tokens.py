"""Stage B of the paper's first version, on tokens: each formula against plain numpy, and a run with it."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import sample
import score
import train
from conftest import SMALL
from test_networks import CONFIG, init
from wuerstchen import (Config, StageBConfig, TextConfig, TokenStageB, Wuerstchen, random_numbers, replace_tokens,
                        sample_tokens, timesteps, token_loss)

TOKENS = replace(CONFIG, b=replace(CONFIG.b, sees_semantic=(False,) * 3, dropout=0.0, token_width=6))


def make():
    return init(TokenStageB(TOKENS), 0.3).eval()


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def test_published_size():
    config = Config(text_b=TextConfig(), b=StageBConfig((640, 1280, 1280), (4, 12, 4), (0, 16, 16), (False,) * 3,
                                                        token_width=256))
    with torch.device("meta"):
        count = sum(p.numel() for p in TokenStageB(config).parameters())
    assert count == 730_814_336  # the paper's 0.73 billion


@torch.no_grad()
def test_ends_of_the_network_by_hand(monkeypatch):
    """Codes -> normalised embeddings into the U-Net; from the U-Net, 2x2 tokens per place -> normalised -> logits."""
    b, codes, seen, h = make(), torch.randint(32, (2, 4, 6)), [], torch.randn(2, 2, 3, 8)
    monkeypatch.setattr(b, "unet", lambda x, t, conditions: seen.append((x, t, conditions)) or h)
    logits, t = b.predict_logits(codes, torch.ones(2), "conditions"), torch.ones(2)
    assert_close(seen[0][0].numpy(), normalised(b.tokens.weight.numpy()[codes]), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[0][1], t) and seen[0][2] == "conditions"
    wide = h.numpy() @ b.out.weight.numpy().T + b.out.bias.numpy()  # (2, 2, 3, 6·4), channel by channel
    tokens = wide.reshape(2, 2, 3, 6, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(2, 4, 6, 6)
    assert_close(logits.numpy(), normalised(tokens) @ b.logits.weight.numpy().T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_conditions_are_one_sequence(monkeypatch):
    b, semantic, text, seen = make(), torch.randn(2, 2, 3, 6), torch.randn(2, 8, 12), []
    for blocks in (*b.down, *b.up):
        monkeypatch.setattr(blocks, "keys_values", lambda x: seen.append(x.numpy()) or "kv")
    assert b.encode_conditions(semantic, text, (8, 16)) == [(None, "kv")] * 6
    cells = semantic.numpy().reshape(2, 6, 6) @ b.semantic_mapper.weight.numpy().T + b.semantic_mapper.bias.numpy()
    words = text.numpy() @ b.text_mapper.weight.numpy().T + b.text_mapper.bias.numpy()
    for sequence in seen:
        assert_close(sequence, normalised(np.concatenate([cells, words], axis=1)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_skip_enters_before_the_convolution():
    """Output channel g of the convolution sees channels 2g and 2g + 1 of [x, skip]: the first half of the channels sees
    x alone, the second half the skip alone."""
    b = make()
    block = b.up[1][0].res
    x, skip = torch.randn(2, 1, 3, 5, block.norm.normalized_shape[0])
    both = np.pad(np.concatenate([x, skip], axis=-1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    weight, h = block.depthwise.weight.numpy(), np.zeros(x.shape) + block.depthwise.bias.numpy()
    for g in range(x.shape[-1]):
        for dy in range(3):
            for dx in range(3):
                h[..., g] += both[:, dy:dy + 3, dx:dx + 5, 2 * g:2 * g + 2] @ weight[g, :, dy, dx]
    h = block.grn(torch.nn.functional.gelu(block.expand(torch.from_numpy(normalised(h)).float())))
    assert_close(block(x, skip), x + block.project(h), rtol=1e-4, atol=1e-4)
    assert b.up[0][0].res.depthwise.in_channels // b.up[0][0].res.depthwise.groups == 1  # the lowest level has no skip


def test_a_fresh_network_knows_nothing_yet():
    b, t = TokenStageB(TOKENS), torch.rand(2)
    given = torch.randint(32, (2, 8, 16)), t, torch.randn(2, 2, 3, 6), torch.randn(2, 8, 12)
    assert torch.equal(b.tokens.weight, b.logits.weight) and b.tokens.weight is not b.logits.weight
    assert abs(b.tokens.weight.std() - 32 ** -0.5) < 0.03
    assert not b(*given).any()  # all logits are 0
    assert abs(b.semantic_mapper.weight.std() - 0.02) < 0.005
    b = make()
    logits = b(*given)
    logits.square().sum().backward()
    assert logits.shape == (2, 8, 16, 32)
    for name, p in b.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    for i in range(4):  # all that is given has an effect
        changed = list(given)
        changed[i] = (given[i] + 1) % 32 if i == 0 else given[i] + 0.5
        assert not torch.allclose(b(*changed), logits, atol=1e-4)


def test_replace_tokens():
    codes, others, t = torch.full((3, 100, 100), 7), torch.full((3, 100, 100), 9), torch.tensor([0.0, 0.3, 1.0])
    noisy, replaced = replace_tokens(codes, others, t)
    assert torch.equal(noisy == 9, replaced) and torch.equal(noisy == 7, ~replaced)
    shares = replaced.float().mean(dim=(1, 2))
    assert shares[0] == 0 and shares[2] == 1 and abs(shares[1] - 0.3) < 0.02


def test_token_loss_by_hand():
    logits, codes, t = torch.randn(2, 3, 3, 5), torch.randint(5, (2, 3, 3)), torch.tensor([0.2, 0.9])
    replaced = torch.rand(2, 3, 3) < 0.5
    log = logits.double().numpy() - np.log(np.exp(logits.double().numpy()).sum(-1, keepdims=True))
    expected = []
    for image in range(2):
        weights, errors = [], []
        for y in range(3):
            for x in range(3):
                target = np.full(5, 0.1 / 5)  # label smoothing
                target[codes[image, y, x]] += 0.9
                errors.append(-(target * log[image, y, x]).sum())
                weights.append(1 if replaced[image, y, x] else 0.3 + 0.7 * t[image].item())
        expected.append(np.average(errors, weights=weights))
    assert token_loss(logits, codes, replaced, t).tolist() == pytest.approx(expected, rel=1e-5)


def test_sampling_by_hand():
    """Three steps with a network whose output is known: what it is given, the order of the random numbers, what is put
    back, and how temperature and guidance enter."""
    start, seen, logits = torch.randint(4, (2, 3, 5)), [], 2 * torch.randn(4, 3, 5, 4)

    def network(codes, t, conditions):
        seen.append((codes, t))
        return logits

    times, generator = timesteps(3, "cpu"), torch.Generator().manual_seed(3)
    end = sample_tokens(network, start, times, "conditions", 2.0, torch.Generator().manual_seed(3), (1.0, 0.2))
    codes, given = start, (logits[2:] + 2 * (logits[:2] - logits[2:])).numpy()
    for (now, t), expected, after, temperature in zip(seen, (1, 2 / 3, 1 / 3), (2 / 3, 1 / 3, 0), (1.0, 0.6, 0.2)):
        assert torch.equal(now, torch.cat([codes, codes])) and t.tolist() == pytest.approx([expected] * 4)
        u = torch.rand(2, 3, 5, 4, generator=generator).double().numpy()
        drawn = torch.from_numpy((given / temperature - np.log(-np.log(u))).argmax(-1))
        codes = torch.where(torch.rand(2, 3, 5, generator=generator) < after, start, drawn)
    assert torch.equal(end, codes)


def test_a_step_draws_from_the_softmax():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(1, 200, 200, 3)
    drawn = sample_tokens(lambda codes, t, conditions: logits, torch.zeros(1, 200, 200, dtype=torch.int64),
                          timesteps(1, "cpu"), None, temperatures=(1.0, 1.0))
    shares = torch.bincount(drawn.flatten()) / 40_000
    assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.01, rtol=0)
    assert math.isclose(random_numbers(torch.rand, (1, 100, 100), None, "cpu").mean(), 0.5, abs_tol=0.02)


def test_a_run_with_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Shapes, "captions", lambda self: map(self.caption, range(2000)))
    folder, handed = tmp_path / "run", []
    loss = train.token_stage_b_loss
    monkeypatch.setattr(train, "token_stage_b_loss", lambda *given, codes, **named: handed.append(codes) or loss(
        *given, codes=codes, **named))
    train.main(["--run", str(folder), "--tokens", *SMALL])
    model = Wuerstchen.load(folder)
    assert isinstance(model.b, TokenStageB) and json.loads((folder / "options.json").read_text())["tokens"]
    codes = handed[0]
    assert codes.shape == (8, 16, 16) and codes.dtype == torch.int64 and 0 <= codes.min() and codes.max() < 512
    images = model.generate(["a red star"] * 3, steps=(2, 3), seed=[5, 6, 5])
    assert images.shape == (3, 64, 64, 3) and torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    known = [set(map(tuple, x.tolist())) for x in (model.a.quantizer.codebook, model.sample_b(
        torch.randint(512, (1, 16, 16)), timesteps(2, "cpu"), torch.zeros(1, 2, 2, 16), [""])[0].flatten(0, 1))]
    assert known[1] <= known[0]  # latents are entries of the codebook
    sample.main(["a red star", "--run", str(folder), "--out", str(tmp_path / "out.png"), "--cfg-b", "2", "--device",
                 "cpu"])
    score.main(["--run", str(folder), "--count", "2", "--steps-c", "2", "--steps-b", "2", "--device", "cpu"])
