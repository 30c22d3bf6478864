"""Every network of wuerstchen.py: sizes, shapes, gradients."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wuerstchen import (CLIP, PRESETS, AttnBlock, CompressorConfig, Conv, ConvUp, Discriminator, EfficientNet,
                        GlobalResponseNorm, MBConv, Quantizer, ResBlock, SemanticCompressor, StageB, StageBConfig,
                        StageC, StageCConfig, TextConfig, TextEncoder, TimestepBlock, VQBlock, VQGAN, VQGANConfig,
                        attention, codebook_usage, contrastive_loss, depth_to_space, space_to_depth, time_embedding)

TEXT = TextConfig(vocab_size=50, length=8, width=16, depth=2, heads=2, mlp_width=32)
VQ = VQGANConfig(channels=(8, 16), blocks=2, codebook_size=32, disc_depth=3, disc_width=16)
COMPRESSOR = CompressorConfig(stem=8, stages=(("fused", 1, 1, 8, 2), ("fused", 4, 2, 12, 1), ("mbconv", 4, 2, 16, 2),
                                              ("mbconv", 6, 1, 20, 1), ("mbconv", 6, 2, 24, 1),
                                              ("mbconv", 4, 2, 24, 2)),
                              features=32, stochastic_depth=0.2, channels=6)
B = StageBConfig(channels=(8, 16, 24), blocks=(1, 2, 2), heads=(0, 2, 3), semantic=(False, True, True), cond_width=12,
                 text_width=16, semantic_channels=6, time_width=8)
C = StageCConfig(width=16, depth=2, heads=2, text_width=16, channels=6, time_width=8)


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomise(module):
    """No parameter at its start value, where zeros would hide half of the network."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def test_v2_has_the_published_number_of_parameters():
    v2 = PRESETS["v2"]
    with torch.device("meta"):
        assert count(VQGAN(v2.a)) == 18_406_894
        assert count(EfficientNet(v2.compressor)) == 20_177_488
        assert count(SemanticCompressor(v2.compressor)) == 20_177_488 + 1280 * 16 + 2 * 16
        assert count(StageB(v2.b)) == 1_055_365_280
        assert count(StageC(v2.c)) == 993_636_896
        assert count(TextEncoder(v2.text_b)) == 352_984_064
        assert count(TextEncoder(v2.text)) == 693_021_440


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_together(preset):
    config = PRESETS[preset]
    assert config.c.channels == config.b.semantic_channels == config.compressor.channels == 16
    assert config.a.latent_channels == config.b.latent_channels == 4
    assert config.c.text_width == config.text.width
    assert config.b.text_width == config.text_b.width
    assert config.image_size % config.stride == 0


def test_tiny_shapes():
    """128 px: A's latents 32x32x4, semantic latents 3x3x16: 42.67 times smaller."""
    config = PRESETS["tiny"]
    assert config.grid(128, 128) == ((3, 3), (32, 32))
    images = torch.rand(1, 128, 128, 3)
    assert VQGAN(config.a).encode(images).shape == (1, 32, 32, 4)
    assert SemanticCompressor(config.compressor).eval()(torch.rand(1, 96, 96, 3)).shape == (1, 3, 3, 16)


def test_grid_of_the_published_model():
    """ceil(pixels / 42.67) cells and int(10.67 cells) latents wherever that divides by 16."""
    grid = PRESETS["v2"].grid
    assert grid(1024, 1024) == ((24, 24), (256, 256))
    for pixels in range(1, 4000):
        (cells, _), (latents, _) = grid(pixels, 1024)
        assert cells == math.ceil(pixels / 42.67)
        published = int(10.67 * cells)
        assert latents % 16 == 0 and (latents == published or published % 16)
        assert abs(latents - published) <= 8 or latents == 16
    assert grid(512, 1536) == ((12, 36), (128, 384))


def test_space_to_depth_is_pixel_unshuffle():
    x = torch.randn(2, 6, 4, 3)
    y = space_to_depth(x, 2)
    assert torch.equal(y, F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))
    assert torch.equal(depth_to_space(y, 2), x)
    assert torch.equal(x, F.pixel_shuffle(y.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))


def test_channels_last_convolutions():
    x = torch.randn(2, 5, 7, 4)
    for layer in (Conv(4, 6, 3, padding=1), ConvUp(4, 6, 2, stride=2)):
        plain = super(type(layer), layer).forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(layer(x), plain)
        assert layer(x).is_contiguous()  # no memory moves around it


def test_grn_by_hand():
    grn = GlobalResponseNorm(2)
    x = torch.tensor([3.0, 1.0, 4.0, 0.0]).view(1, 1, 2, 2)  # channel 0: (3, 4), norm 5; channel 1: (1, 0), norm 1
    assert torch.equal(grn(x), x)  # starts as the identity
    grn.gamma.data, grn.beta.data = torch.tensor([0.5, 2.0]), torch.tensor([0.1, -0.1])
    wide, narrow = 5 / 3, 1 / 3  # norms over their mean, 3
    expected = torch.tensor([3 * (1 + 0.5 * wide) + 0.1, 1 * (1 + 2 * narrow) - 0.1, 4 * (1 + 0.5 * wide) + 0.1, -0.1])
    torch.testing.assert_close(grn(x).flatten(), expected, rtol=1e-5, atol=1e-5)


def test_blocks_start_gently():
    """A TimestepBlock with zero weights and a VQBlock with zero gammas change nothing."""
    x = torch.randn(2, 4, 4, 8)
    block = TimestepBlock(8, 6)
    nn.init.zeros_(block.mapper.weight), nn.init.zeros_(block.mapper.bias)
    assert torch.equal(block(x, torch.randn(2, 6)), x)
    assert torch.equal(VQBlock(8)(x), x)


def test_timestep_block_by_hand():
    block = TimestepBlock(1, 1)
    block.mapper.weight.data, block.mapper.bias.data = torch.tensor([[2.0], [3.0]]), torch.tensor([0.5, -1.0])
    # a = 2·0.25 + 0.5 = 1, b = 3·0.25 - 1 = -0.25
    assert block(torch.full((1, 1, 1, 1), 4.0), torch.tensor([[0.25]])).item() == 4 * 2 - 0.25


def test_time_embedding_by_hand():
    embedding = time_embedding(torch.tensor([0.0, 0.0001]), 4)  # times 10,000: 0 and 1; frequencies 1 and 1/10,000
    expected = [[0, 0, 1, 1], [math.sin(1), math.sin(1e-4), math.cos(1), math.cos(1e-4)]]
    torch.testing.assert_close(embedding, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_of_attention_agree(masked):
    q, k, v = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    mask = (torch.rand(2, 1, 5, 7) > 0.4).logical_or(torch.arange(7) == 0) if masked else None
    by_hand = attention(q, k, v, mask)
    with torch.no_grad():
        fused = attention(q, k, v, mask)
    torch.testing.assert_close(by_hand, fused)


def test_attn_block_sees_text_and_the_whole_picture():
    block = randomise(AttnBlock(8, 6, 2))
    x, text = torch.randn(1, 3, 4, 8, requires_grad=True), torch.randn(1, 5, 6, requires_grad=True)
    block(x, block.read(text))[0, 0, 0].sum().backward()  # of one position
    assert (x.grad.abs().sum(dim=-1) > 0).all() and (text.grad.abs().sum(dim=-1) > 0).all()


def test_text_encoder_is_causal_and_blind_to_padding():
    encoder = randomise(TextEncoder(TEXT))
    ids = torch.randint(50, (1, 8))
    mask = torch.arange(8)[None] < 5
    before = encoder(ids, mask)
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 50
    after = encoder(changed, mask)
    assert torch.equal(before[0, :3], after[0, :3]) and not torch.equal(before[0, 3:], after[0, 3:])
    padding = ids.clone()
    padding[0, 6] = (ids[0, 6] + 1) % 50
    after = encoder(padding, mask)
    same = (before == after).all(dim=-1)[0]
    assert same.tolist() == [True] * 6 + [False, True]  # only its own place notices


def test_contrastive_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    ids = torch.tensor([[1, 2], [3, 4]])
    rows = (-math.log(math.exp(2) / (math.exp(2) + 1)) - math.log(math.e / (math.e + 1))) / 2
    assert contrastive_loss(logits, ids).item() == pytest.approx(rows, abs=1e-6)  # symmetric: columns are the same
    # Equal captions are both right: the best a row can do is to spread evenly, at the price of log 2.
    same = torch.tensor([[1, 2], [1, 2]])
    assert contrastive_loss(torch.zeros(2, 2), same).item() == pytest.approx(math.log(2), abs=1e-6)
    assert contrastive_loss(logits, same) > math.log(2)
    # A third caption, no picture's own, only makes the rows harder: log-sum-exp over three.
    more = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    rows3 = (math.log(math.exp(2) + 1 + math.e) - 2 + math.log(1 + math.e + math.exp(3)) - 1) / 2
    assert contrastive_loss(more, torch.tensor([[1, 2], [3, 4], [5, 6]])).item() == pytest.approx((rows3 + rows) / 2,
                                                                                                 abs=1e-6)


def networks():
    text, mask = torch.randn(3, 8, 16), torch.arange(8).expand(3, 8) < 5
    t = torch.tensor([0.1, 0.5, 0.9])
    return {
        "text": (TextEncoder(TEXT), (torch.randint(50, (3, 8)), mask)),
        "clip": (None, (torch.rand(3, 32, 32, 3), torch.randint(50, (3, 8)), mask)),
        "vqgan": (VQGAN(VQ), (torch.rand(3, 16, 24, 3),)),
        "discriminator": (Discriminator(3, 16), (torch.rand(3, 32, 32, 3),)),
        "compressor": (SemanticCompressor(COMPRESSOR), (torch.rand(3, 64, 96, 3),)),
        "b": (StageB(B), (torch.randn(3, 8, 16, 4), t, torch.randn(3, 2, 3, 6), text)),
        "c": (StageC(C), (torch.randn(3, 3, 5, 6), t, text)),
    }


@pytest.mark.parametrize("name", networks())
def test_gradients_reach_every_parameter(name):
    network, inputs = networks()[name]
    if name == "clip":
        config = copy.deepcopy(PRESETS["tiny"])
        config.text, config.compressor = TEXT, COMPRESSOR
        network = CLIP(config)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn_like(p)
    for module in network.modules():
        if isinstance(module, MBConv):
            module.drop = 0.0  # a block left out by chance has no gradient
    output = network(*inputs)
    outputs = output if isinstance(output, tuple) else (output,)
    sum((y * torch.randn_like(y)).sum() for y in outputs if y.dtype.is_floating_point).backward()
    # Of tokens, positions and codes, those in use.
    for key, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        assert p.grad.abs().sum() > 0, key


def test_compressor_rounds_sizes_up():
    compressor = SemanticCompressor(COMPRESSOR).eval()
    assert compressor(torch.rand(2, 33, 70, 3)).shape == (2, 2, 3, 6)


def test_stochastic_depth_leaves_blocks_out_only_in_training():
    block = MBConv(4, 4, 4, 1, fused=False, drop=0.5)
    x = torch.randn(64, 4, 5, 5)
    left_out = (block(x) == x).flatten(1).all(dim=1)
    assert 10 < left_out.sum() < 54
    assert not (block.eval()(x) == x).flatten(1).all(dim=1).any()


def test_stage_b_uses_everything_it_is_given():
    b, (x, t, semantic, text) = randomise(StageB(B)).eval(), networks()["b"][1]
    with torch.no_grad():
        before = b(x, t, semantic, text)
        assert before.shape == x.shape
        for inputs in ((x, t, semantic + 1, text), (x, t, semantic, text + torch.randn_like(text)),
                       (x, t * 0.5, semantic, text)):
            assert not torch.allclose(before, b(*inputs), atol=1e-4)


def test_fresh_stages_predict_the_noise_at_the_end_of_time():
    """With a zero last layer the parametrisation gives x/b or x/1: at t = 1, x is the noise but for a constant."""
    b, (x, t, semantic, text) = StageB(B), networks()["b"][1]
    torch.testing.assert_close(b(x, t, semantic, text), x / 0.5)
    torch.testing.assert_close(StageC(C)(torch.ones(1, 3, 3, 6), t[:1], text[:1]), torch.ones(1, 3, 3, 6) / (1 + 1e-5))


def test_quantizer():
    quantizer = Quantizer(3, 2)
    quantizer.codebook.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    x = torch.tensor([[0.1, 0.2], [0.8, -0.1], [0.2, 1.2]]).view(1, 1, 3, 2).requires_grad_()
    quantized, codes, loss = quantizer(x)
    assert codes.tolist() == [[[0, 1, 2]]]
    torch.testing.assert_close(quantized.view(3, 2), quantizer.codebook.data)
    error = (0.01 + 0.04 + 0.04 + 0.01 + 0.04 + 0.64) / 6
    assert loss.item() == pytest.approx(1.25 * error, abs=1e-6)
    quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # straight through


def test_codebook_usage_by_hand():
    usage, perplexity = codebook_usage(torch.tensor([0, 0, 1, 1]), 8)
    assert usage == 0.25 and perplexity == pytest.approx(2)
    assert codebook_usage(torch.full((5, 5), 3), 8) == (0.125, 1.0)


def test_dead_codes_are_revived():
    quantizer, idle = Quantizer(16, 2), torch.full((16,), math.inf)
    quantizer.codebook.data[1:] += 100  # out of reach: only code 0 is ever nearest
    x = torch.randn(1, 8, 8, 2)
    assert codebook_usage(quantizer(x)[1], 16)[0] == 1 / 16
    assert quantizer.revive(x, quantizer(x)[1], idle, patience=3) == 15  # the first batch places them all
    assert codebook_usage(quantizer(x)[1], 16)[0] > 0.9
    quantizer.codebook.data[1:] += 100
    assert [quantizer.revive(x, quantizer(x)[1], idle, patience=3) for _ in range(4)] == [0, 0, 15, 0]


def test_nearest_codes_are_found_in_float32():
    quantizer = Quantizer(512, 4)
    nn.init.normal_(quantizer.codebook)
    x = torch.randn(4, 8, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantizer(x)[1]
    assert torch.equal(codes, torch.cdist(x.flatten(0, 2), quantizer.codebook).argmin(dim=1).view(4, 8, 8))
