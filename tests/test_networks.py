"""Every network of wuerstchen.py: sizes, shapes, gradients, and each block against values worked out by hand."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wuerstchen import (CLIP, PRESETS, AttnBlock, CompressorConfig, Config, Discriminator, GlobalResponseNorm, MBConv,
                        Quantizer, ResBlock, SemanticCompressor, StageB, StageBConfig, StageC, StageCConfig, TextConfig,
                        TextEncoder, TimestepBlock, VQBlock, VQGAN, VQGANConfig, Wuerstchen, contrastive_loss, rescaled,
                        time_embedding)

CONFIG = Config(
    image_size=64, semantic_channels=6, time_width=8,
    text_c=TextConfig(vocab_size=50, length=8, width=16, depth=2, heads=2, mlp_width=32),
    text_b=TextConfig(vocab_size=50, length=8, width=12, depth=2, heads=2, mlp_width=24),
    a=VQGANConfig(channels=(8, 16), blocks=2, codebook_size=32),
    compressor=CompressorConfig(8, (("fused", 1, 1, 8, 2), ("fused", 4, 2, 12, 1), ("mbconv", 4, 2, 16, 2),
                                    ("mbconv", 6, 2, 24, 1), ("mbconv", 4, 2, 24, 2)), 32, stochastic_depth=0.8),
    b=StageBConfig((8, 16, 24), (1, 2, 2), heads=(0, 2, 3), sees_semantic=(False, True, True), cond_width=10),
    c=StageCConfig(width=16, depth=2, heads=2))


def networks():
    """name: (a small network, three rows of what it takes)"""
    ids, mask, t = torch.randint(50, (3, 8)), torch.arange(8).expand(3, 8) < 5, torch.tensor([0.1, 0.5, 0.9])
    return {
        "text": (TextEncoder(CONFIG.text_c), (ids, mask)),
        "clip": (CLIP(CONFIG), (torch.rand(3, 32, 32, 3), ids, mask)),
        "vqgan": (VQGAN(CONFIG), (torch.rand(3, 16, 24, 3),)),
        "discriminator": (Discriminator(3, 16), (torch.rand(3, 32, 32, 3),)),
        "compressor": (SemanticCompressor(CONFIG), (torch.rand(3, 64, 96, 3),)),
        "b": (StageB(CONFIG), (torch.randn(3, 8, 16, 4), t, torch.randn(3, 2, 3, 6), torch.randn(3, 8, 12))),
        "c": (StageC(CONFIG), (torch.randn(3, 3, 5, 6), t, torch.randn(3, 8, 16))),
    }


def init(module, std):
    """All parameters from N(0, std²): a network starts with zeros that would hide half of it. 0: all are zero."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_together(preset):
    config, side = PRESETS[preset], PRESETS[preset].image_size
    assert side % config.stride == 0 and config.grid(side, side) == ((config.cells,) * 2, (side // 4,) * 2)
    with torch.device("meta"):  # shapes alone
        model, images, t = Wuerstchen(config, None), torch.rand(1, side, side, 3), torch.ones(1)
        ids = torch.ones(1, config.text_c.length, dtype=torch.int64)
        latents, semantic = model.a.encode(images), model.compressor(rescaled(images, config.rescale))
        assert latents.shape == (1, side // 4, side // 4, 4) and model.a.decode(latents).shape == images.shape
        assert semantic.shape == (1, config.cells, config.cells, 16)
        assert model.b(latents, t, semantic, model.text_b(ids, ids > 0)).shape == latents.shape
        assert model.c(semantic, t, model.text_c(ids, ids > 0)).shape == semantic.shape
    if preset == "v2":
        published = {"a": 18_406_894, "compressor": 20_177_488 + 1280 * 16 + 2 * 16, "b": 1_055_365_280,
                     "c": 993_636_896, "text_b": 352_984_064, "text_c": 693_021_440}
        assert {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in published} == published


def test_grid_of_the_published_model():
    """ceil(pixels / 42.67) cells and int(10.67 cells) latents wherever that is a multiple of 16."""
    assert PRESETS["tiny"].grid(128, 128) == ((3, 3), (32, 32))
    config = replace(PRESETS["tiny"], image_size=64, rescale=2.5)
    assert config.grid(64, 64) == ((5, 5), (16, 16)) and config.grid(128, 64) == ((10, 5), (32, 16))
    grid = PRESETS["v2"].grid
    for pixels in range(1, 4000):
        (cells, _), (latents, _) = grid(pixels, 1024)
        published = int(10.67 * cells)
        assert cells == math.ceil(pixels / 42.67) and latents % 16 == 0
        assert latents == published or published % 16 and (abs(latents - published) <= 8 or latents == 16)
    assert grid(512, 1536) == ((12, 36), (128, 384))


@pytest.mark.parametrize("name", networks())
def test_gradients_reach_every_parameter_and_input(name):
    network, inputs = networks()[name]
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for module in network.modules():
        module.drop = 0.0  # a block of the compressor that is left out by chance has no gradient
    named = {f"input {i}": x.requires_grad_() for i, x in enumerate(inputs) if x.is_floating_point()}
    outputs = network(*inputs) if name == "vqgan" else (network(*inputs),)
    sum((y * torch.randn_like(y)).sum() for y in outputs if y.is_floating_point()).backward()
    for key, p in (named | dict(network.named_parameters())).items():  # of tokens, positions and codes, those in use
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, key


def test_grn_by_hand():
    """Image 0: channels (3, 4) and (1, 0), norms 5 and 1, mean 3. Image 1: (0, 0) and (2, 0), norms 0 and 2, mean 1."""
    grn, x = GlobalResponseNorm(2), torch.tensor([3.0, 1, 4, 0, 0, 2, 0, 0]).view(2, 1, 2, 2)
    assert torch.equal(grn(x), x)  # starts as the identity
    grn.gamma.data, grn.beta.data = torch.tensor([0.5, 2.0]), torch.tensor([0.1, -0.1])
    expected = [3 + 2.5 + 0.1, 1 + 2 / 3 - 0.1, 4 + 10 / 3 + 0.1, -0.1, 0.1, 2 + 8 - 0.1, 0.1, -0.1]
    assert_close(grn(x).flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_res_block_by_hand():
    """Pixels read their left neighbour. A hidden channel adds up the inputs, and is too large for GELU to matter."""
    block = init(ResBlock(2, extra_channels=2), 0)
    block.depthwise.weight.data[:, :, 1, 0] = 1
    block.expand.weight.data[0] = torch.tensor([1.0, 10, 100, 1000])  # x, x, skip, semantic
    block.project.weight.data[:, 0] = torch.tensor([1.0, 2.0])
    x, one = torch.tensor([[[[3.0, 1.0], [5.0, 9.0]]]]), torch.ones(1, 1, 2, 1)
    # Left of the first pixel there is nothing; left of the second, (3, 1) is normalised to (1, -1).
    first, second = 100 * 0.5 + 1000, 1 - 10 + 100 * 0.5 + 1000
    expected = torch.tensor([[[[3 + first, 1 + 2 * first], [5 + second, 9 + 2 * second]]]])
    assert_close(block(x, 0.5 * one, one), expected, rtol=1e-5, atol=1e-4)


def test_time_by_hand():
    embedding = time_embedding(torch.tensor([0.0, 0.0001]), 4)  # times 10,000: 0 and 1; frequencies 1 and 1/10,000
    assert_close(embedding, torch.tensor([[0, 0, 1, 1], [math.sin(1), math.sin(1e-4), math.cos(1), math.cos(1e-4)]]))
    block = TimestepBlock(1, 1)
    block.mapper.weight.data, block.mapper.bias.data = torch.tensor([[2.0], [3.0]]), torch.tensor([0.5, -1.0])
    # a = 2·0.25 + 0.5 = 1, b = 3·0.25 - 1 = -0.25
    assert block(torch.full((1, 1, 1, 1), 4.0), torch.tensor([[0.25]])).item() == 4 * (1 + 1) - 0.25


def test_attn_block_by_hand():
    """Pixels (2, 0) and (0, 4), normalised (1, -1) and (-1, 1), attend to each other and to the text (1, -2)."""
    block = init(AttnBlock(2, 2, heads=1), 0)
    attention = block.attention
    for linear, factor in ((block.kv, 2), (attention.q, 1), (attention.k, 0.5), (attention.v, 3), (attention.out, 1)):
        linear.weight.data = factor * torch.eye(2)
    s, expected = [2 * y / (1 + math.exp(-y)) for y in (1, -2)], []  # twice the text's SiLU
    for (x0, x1), h in (((2, 0), 1), ((0, 4), -1)):  # the pixel, and the first channel of its query
        a, b, c = (math.exp(0.5 * product / math.sqrt(2)) for product in (2 * h, -2 * h, h * (s[0] - s[1])))
        expected.append([x0 + 3 * (a - b + c * s[0]) / (a + b + c), x1 + 3 * (b - a + c * s[1]) / (a + b + c)])
    y = block(torch.tensor([[[[2.0, 0.0], [0.0, 4.0]]]]), block.keys_values(torch.tensor([[[1.0, -2.0]]])))
    assert_close(y, torch.tensor([[expected]]), rtol=1e-5, atol=1e-5)


def test_text_encoder_is_causal_and_blind_to_padding():
    encoder, ids, mask = init(TextEncoder(CONFIG.text_c), 0.3), torch.randint(50, (1, 8)), torch.arange(8)[None] < 5
    for place, notice in ((3, [3, 4, 5, 6, 7]), (6, [6])):  # 6 is padding: only its own place notices
        changed = (ids + (torch.arange(8) == place)) % 50
        differs = (encoder(ids, mask) != encoder(changed, mask)).any(dim=-1)[0]
        assert differs.nonzero().flatten().tolist() == notice


@torch.no_grad()
def test_clip_by_hand():
    clip, images = CLIP(CONFIG).eval(), torch.rand(2, 32, 32, 3)
    assert_close(clip.embed_images(images).norm(dim=1), torch.ones(2))
    clip.image.forward = lambda x: x  # 8 px -> 6 px -> 3x3 parts of 2x2 pixels
    parts = rescaled(images[:, :8, :8], 0.75).unflatten(1, (3, 2)).unflatten(3, (3, 2)).mean(dim=(2, 4)).flatten(1, 2)
    assert_close(clip.image_features(images[:, :8, :8]), parts)
    clip.text.forward = lambda ids, mask: 3 * torch.eye(8, 12).expand(2, 8, 12)  # token i: 3 in channel i
    clip.text_projection.weight.data = torch.eye(12)
    embeddings = clip.embed_text(torch.ones(2, 8), torch.arange(8) < torch.tensor([[3], [7]]))
    assert torch.equal(embeddings, torch.eye(12)[[2, 6]])  # the end tokens
    image, text = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[0.6, 0.8], [1, 0], [0, -1]])
    cosines = torch.tensor([[0.6, 1, 0], [0.8, 0, -1]])
    for scale, factor in ((clip.logit_scale.exp(), 1 / 0.07), (10, 10), (1000, 100)):  # as at first, and up to 100
        clip.logit_scale.fill_(math.log(scale))
        assert_close(clip.compare(image, text), factor * cosines)


def test_contrastive_loss_by_hand():
    """Each logit is the logarithm of its share. The third caption is no image's own: only the rows include it."""
    logits, ids = torch.tensor([[4.0, 1, 3], [2, 2, 4]]).log(), torch.tensor([[1, 2], [3, 4], [3, 5]])
    for captions, right in (([0, 1], (4 / 5, 2 / 4, 4 / 6, 2 / 3)), ([0, 1, 2], (4 / 8, 2 / 8, 4 / 6, 2 / 3)),
                            ([0, 0], (4 / 5, 1 / 5, 2 / 4, 2 / 4, 4 / 6, 2 / 6, 1 / 3, 2 / 3))):  # equal ones
        expected = -sum(map(math.log, right)) / len(right)
        assert contrastive_loss(logits[:, :len(captions)], ids[captions]).item() == pytest.approx(expected, abs=1e-6)


def test_quantizer_by_hand():
    quantizer = Quantizer(4, 2)
    quantizer.codebook.data = codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    x = torch.tensor([[0.1, 0.2], [0.8, -0.1], [0.2, 1.2]]).view(1, 1, 3, 2).requires_grad_()
    quantized, codes, loss = quantizer(x)
    assert_close((codes, quantized), (torch.tensor([[[0, 1, 2]]]), codebook[:3].view(1, 1, 3, 2)))
    error = torch.tensor([[0.1, 0.2], [-0.2, -0.1], [0.2, -0.8], [0, 0]])  # of each code's latent
    assert_close(loss, 1.25 * error.square().sum() / 6)
    of_x, of_codebook = torch.autograd.grad(loss, (x, quantizer.codebook))
    assert_close(of_x.view(3, 2), 0.25 * 2 * error[:3] / 6)
    assert_close(of_codebook, -2 * error / 6)
    of_x, of_codebook = torch.autograd.grad((3 * quantized).sum(), (x, quantizer.codebook), allow_unused=True)
    assert of_x.unique() == 3 and of_codebook is None  # straight through


@torch.no_grad()
def test_vqgan_quantizes_between_its_halves():
    vqgan, images, x = init(VQGAN(CONFIG), 0.3).eval(), torch.rand(2, 16, 24, 3), torch.randn(1, 16, 16, 8)
    reconstruction, latents, codes, _ = vqgan(images)
    assert torch.equal(latents, vqgan.encode(images))
    assert_close(reconstruction, vqgan.decode(vqgan.quantizer.codebook[codes]))
    assert torch.equal(VQBlock(8)(x), x)  # zero gammas, as at first
    quantizer = init(Quantizer(512, 8), 1)
    nearest = torch.cdist(x.flatten(0, 2), quantizer.codebook).argmin(dim=1).view(1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(x)[1], nearest)  # found in float32


def test_discriminator_is_spectrally_normalised():
    discriminator = Discriminator(3, 64)
    assert discriminator(torch.rand(2, 32, 24, 3)).shape == (2, 1, 4, 3)
    norms = [torch.linalg.matrix_norm(discriminator.net[i].weight.flatten(1), 2).item() for i in (0, 2, 5)]
    assert norms == pytest.approx([1, 1, 1], abs=0.05)  # of the convolutions with stride


@torch.no_grad()
def test_stochastic_depth_keeps_the_expectation():
    block, x = MBConv(4, 4, 4, 1, fused=False, drop=0.25), torch.randn(400, 4, 3, 3)
    h, y = block.layers(x), block(x)
    left_out = (y == x).flatten(1).all(dim=1)
    assert 60 < left_out.sum() < 140
    assert_close(y[~left_out], (x + h / 0.75)[~left_out])
    assert_close(block.eval()(x), x + block.layers(x))
    compressor = SemanticCompressor(CONFIG).eval()
    assert [m.drop for m in compressor.modules() if isinstance(m, MBConv)] == pytest.approx([i / 10 for i in range(8)])
    assert compressor(torch.rand(2, 33, 70, 3)).shape == (2, 2, 3, 6)  # odd sizes are rounded up


@pytest.mark.parametrize("name, total", [("b", 5), ("c", 2)])
def test_stages_start_gently(name, total):
    """Untrained stages return x divided by a constant. The ResBlocks' last weights reach √(1/total) of Xavier's bound
    √(6/(5·width)); the TimestepBlocks change nothing."""
    stage, (x, *given) = networks()[name]
    assert_close(stage(x, *given), x / (0.5 if name == "b" else 1 + 1e-5))
    for block in [block for blocks in (*stage.down, *stage.up) for block in blocks] if name == "b" else stage.blocks:
        h = torch.randn(3, 2, 2, len(block.res.project.bias))
        assert 0.9 < block.res.project.weight.abs().max() / math.sqrt(6 / (5 * h.shape[-1]) / total) <= 1
        assert torch.equal(block.time(h, torch.randn(3, 8)), h)


@torch.no_grad()
def test_stages_split_x_into_a_and_b_times_eps():
    """The last layer says a = 0.5 and some b, whatever comes in."""
    for name, b, divisor in (("b", 100, 0.999), ("b", -100, 0.001), ("b", 0, 0.5), ("c", 3, 2.00001), ("c", 1, 1e-5)):
        stage, given = networks()[name]
        stage.out.bias[:] = torch.tensor([0.5, b]).repeat_interleave(len(stage.out.bias) // 2)
        assert_close(stage(*given), (given[0] - 0.5) / divisor, rtol=1e-4, atol=1e-4)
    stage.latent_mean, stage.latent_std = stage.latent_mean + 1, stage.latent_std * 2  # Stage C's
    assert stage.normalise(torch.tensor(5.0)).unique() == 2 and stage.denormalise(torch.tensor(2.0)).unique() == 5


@torch.no_grad()
@pytest.mark.parametrize("name", ["b", "c"])
def test_conditions_are_computed_once_per_image(name):
    stage, (x, t, *given) = networks()[name]
    init(stage, 0.3).eval()
    conditions = stage.encode_conditions(*given, *[x.shape[1:3]] * (name == "b"))
    for x, t in ((x, t), (x + 1, t / 2)):  # they depend on neither x nor t, and serve more than once
        expected = stage(x, t, *given)
        assert_close(stage.predict_eps(x, t, conditions), expected)
        assert_close(stage(x[1:2], t[1:2], *(y[1:2] for y in given)), expected[1:2], rtol=1e-3, atol=1e-3)  # row by row
