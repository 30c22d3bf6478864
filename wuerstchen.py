"""
Würstchen: text-to-image diffusion in a space 42 times smaller than the image in each direction, in one readable module.

Pernias, Rampas, Richter, Pal, Aubreville: "Würstchen: An Efficient Architecture for Large-Scale Text-to-Image
Diffusion Models", arXiv 2306.00637 ("the paper"; section numbers are those of its second version). Three stages,
trained in the order A -> B -> C and run in the order C -> B -> A:

    caption --TextEncoder--> text --StageC--> semantic latents --StageB--> latents --VQGAN decoder--> image
                                   (B, 24, 24, 16)          (B, 256, 256, 4)              (B, 1024, 1024, 3)

Stage B reads the text too, with a text encoder of its own. In training, semantic latents come from images:

    image --rescaled--> SemanticCompressor --> semantic latents

Stage B's loss trains this compressor too, so they become what helps B most to generate the image. Then Stage C learns
to generate them from text.

Read this file from top to bottom:

    1. sizes        Config and PRESETS
    2. blocks       ResBlock, TimestepBlock, AttnBlock: what Stages B and C are made of
    3. text         TextEncoder, CLIP
    4. Stage A      VQGAN, Discriminator
    5. compressor   EfficientNet, SemanticCompressor
    6. Stage B      a U-Net in Stage A's latent space
    7. Stage C      a flat network on the semantic latents
    8. diffusion    schedule, noise, loss, steps, the sampling loop
    9. Wuerstchen   all of it together: generate, reconstruct, save, load
   10. version 1    Stage B on Stage A's codes; you can skip it
   11. files        saving and loading, including the published weights; you can skip it

Conventions:
- Images and activations are channels last, (B, H, W, C), except inside EfficientNet and the discriminator. LayerNorm
  and Linear then need no permutes, and a 1x1 convolution is a Linear.
- Images are float in [0, 1]. "Latents" are Stage A's; "semantic latents" are the semantic compressor's.
- Time t is continuous in [0, 1]: 0 is clean, 1 is noise. x0 is the clean value, eps the noise added to it.
"""

import json
import math
import mmap
import os
import pickle
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from tokenizer import Tokenizer, UserError, read_json

# ----------------------------------------------------------------------------------------------------------------------
# 1. Sizes. The defaults are the published 1024-px model ("v2").


@dataclass
class TextConfig:
    """A CLIP text transformer. The defaults are ViT-H/14's, which conditions Stage B."""
    vocab_size: int = 49408
    length: int = 77  # tokens per caption, padding included
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 4096


@dataclass
class VQGANConfig:
    """Stage A. Appendix E.1 gives 16 decoder blocks, all 384 wide, but the published weights have the sizes below."""
    channels: tuple = (192, 384)  # of its two levels, at half and at a quarter of the image's size
    blocks: int = 12  # of the decoder, at the lowest resolution
    codebook_size: int = 8192
    scale: float = 0.3764  # Stage B works on latents divided by this; training replaces it with a measured one
    disc_depth: int = 6
    disc_width: int = 512


@dataclass
class CompressorConfig:
    """EfficientNetV2-S. One row per group of layers: (block, expansion, stride, channels, layers)."""
    stem: int = 24
    stages: tuple = (
        ("fused", 1, 1, 24, 2),
        ("fused", 4, 2, 48, 4),
        ("fused", 4, 2, 64, 4),
        ("mbconv", 4, 2, 128, 6),
        ("mbconv", 6, 1, 160, 9),
        ("mbconv", 6, 2, 256, 15),
    )
    features: int = 1280
    stochastic_depth: float = 0.2


@dataclass
class StageBConfig:
    channels: tuple = (320, 640, 1280, 1280)  # of each level
    blocks: tuple = (4, 4, 14, 4)  # on the way down, and mirrored on the way up
    heads: tuple = (0, 10, 20, 20)  # 0: a level without attention
    sees_semantic: tuple = (False, True, True, True)  # levels whose ResBlocks see the semantic latents
    cond_width: int = 1024  # width that text and semantic latents are mapped to
    patch: int = 2
    dropout: float = 0.1
    # Above 0: B predicts Stage A's codes, with embeddings this wide (version 1); `sees_semantic` is all False.
    token_width: int = 0


@dataclass
class StageCConfig:
    """The published Stage C. Appendix E.3 describes a smaller one: 16 blocks, 1280 channels, 16 heads."""
    width: int = 1536
    depth: int = 32
    heads: int = 24
    dropout: float = 0.1


@dataclass
class Config:
    """Sizes of the whole system."""
    image_size: int = 1024  # side of the training images in pixels
    guidance: tuple = (4.0, 1.0)  # default classifier-free guidance scales of C and of B; 1: none
    steps: tuple = (60, 12)  # default numbers of sampling steps of C and of B
    rescale: float = 0.75  # the compressor sees images at this scale, and has a stride of 32
    semantic_channels: int = 16  # of the compressor's output, which B reads and C generates
    latent_channels: int = 4  # of Stage A's latents
    time_width: int = 64  # of the time embedding in B and C
    text_c: TextConfig = field(default_factory=TextConfig)  # for Stage C
    text_b: TextConfig = field(default_factory=TextConfig)  # for Stage B
    a: VQGANConfig = field(default_factory=VQGANConfig)
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    b: StageBConfig = field(default_factory=StageBConfig)
    c: StageCConfig = field(default_factory=StageCConfig)

    @property
    def stride(self):
        """Image sides must be multiples of this: 4 (Stage A's stride), times B's patch, times 2 per down-sampling."""
        return 4 * self.b.patch * 2 ** (len(self.b.channels) - 1)

    @property
    def cells(self):
        """Side of the semantic latents at `image_size`. 128 px, rescaled to 96 -> 3"""
        return math.ceil(round(self.rescale * self.image_size) / 32)

    def grid(self, height, width):
        """Latent sizes for an image of height x width pixels, rounded as in the published model. Along each side, the
        number of semantic cells is the number of pixels divided by image_size / cells (42.67 at 128, 256 and 1024 px if
        `rescale` is 0.75), rounded up. Each cell covers as many of Stage A's latents as in training. The number of
        these latents along each side is then rounded to a multiple of `stride` // 4, as B's down-sampling requires.
        -> semantic (hs, ws), Stage A's latents (h, w)"""
        unit = self.stride // 4
        semantic = [math.ceil(pixels * self.cells / self.image_size) for pixels in (height, width)]
        latents = [int(n * self.image_size / 4 / self.cells) for n in semantic]
        return tuple(semantic), tuple(max(1, round(n / unit)) * unit for n in latents)

    @classmethod
    def from_dict(cls, d):
        """Rebuilds a Config from the dictionary that `asdict` made from it. Raises UserError for anything else."""
        try:
            parts = {field.name: field.type for field in fields(cls) if is_dataclass(field.type)}
            return cls(**{name: parts[name](**value) if name in parts else value for name, value in d.items()})
        except (TypeError, AttributeError) as error:
            raise UserError(f"config.json: {error}") from error


PRESETS = {
    # Trains on two CPU cores with bfloat16 in seven minutes.
    "tiny": Config(
        image_size=128,
        guidance=(2.0, 1.0),
        steps=(20, 12),
        text_c=TextConfig(vocab_size=1024, length=24, width=128, depth=3, heads=4, mlp_width=512),
        text_b=TextConfig(vocab_size=1024, length=24, width=128, depth=3, heads=4, mlp_width=512),
        a=VQGANConfig(channels=(32, 64), blocks=2, codebook_size=512, disc_depth=4, disc_width=128),
        compressor=CompressorConfig(stem=16, stages=(("fused", 4, 2, 24, 1), ("fused", 4, 2, 32, 1),
                                                     ("mbconv", 4, 2, 64, 2), ("mbconv", 4, 1, 80, 1),
                                                     ("mbconv", 4, 2, 128, 1)),
                                    features=256, stochastic_depth=0.0),
        b=StageBConfig(channels=(64, 128, 192), blocks=(1, 1, 1), heads=(0, 0, 4), sees_semantic=(False, True, True),
                       cond_width=64, dropout=0.0),
        c=StageCConfig(width=192, depth=6, heads=6, dropout=0.0),
    ),
    # For training on COCO with one 24 GB GPU. Not trained yet.
    "small": Config(
        image_size=256,
        text_c=TextConfig(vocab_size=8192, length=77, width=512, depth=8, heads=8, mlp_width=2048),
        text_b=TextConfig(vocab_size=8192, length=77, width=512, depth=8, heads=8, mlp_width=2048),
        a=VQGANConfig(channels=(96, 192), blocks=6, codebook_size=4096, disc_depth=5, disc_width=256),
        b=StageBConfig(channels=(128, 256, 512), blocks=(2, 4, 6), heads=(0, 8, 16), sees_semantic=(False, True, True),
                       cond_width=256),
        c=StageCConfig(width=768, depth=16, heads=12),
    ),
    # The published model.
    "v2": Config(
        text_c=TextConfig(width=1280, depth=32, heads=20, mlp_width=5120),  # ViT-bigG/14; B's is the default, ViT-H/14
    ),
}

# "tiny" at 64 px: it trains in half the time, but generates worse images. The images are enlarged to 96 px for the
# compressor, so there are 3x3 cells here too. However, each cell covers 21x21 pixels instead of 43x43, and is learned
# sooner (section 3.4).
PRESETS["quick"] = replace(
    PRESETS["tiny"], image_size=64, rescale=1.5,
    b=replace(PRESETS["tiny"].b, channels=(128, 192), blocks=(1, 1), heads=(0, 4), sees_semantic=(True, True)))

# "quick" with 4x4 cells, because photos are not recognisable with fewer. Photos also need more sampling steps than
# shapes do. With 20 steps for C and 12 for B, the standard deviation of C's semantic latents is one seventh too small,
# and B leaves a grid of dots in clear skies.
PRESETS["cifar"] = replace(PRESETS["quick"], rescale=2.0, guidance=(3.5, 5.0), steps=(60, 24))

# "tiny" with 4x4 cells, for photos with captions in people's own words. Results: tests/gallery/README.md.
PRESETS["photos"] = replace(
    PRESETS["tiny"], rescale=1.0, guidance=(3.5, 2.0), steps=(60, 24),
    text_c=replace(PRESETS["tiny"].text_c, vocab_size=4096, length=40),
    text_b=replace(PRESETS["tiny"].text_b, vocab_size=4096, length=40))

# ----------------------------------------------------------------------------------------------------------------------
# 2. Blocks shared by Stages B and C (appendices E.2 and E.3): ConvNeXt-like, conditioned on time and text.


class Conv(nn.Conv2d):
    """A convolution on (B, H, W, C). The permutes do not copy any data."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvUp(nn.ConvTranspose2d):
    """A transposed convolution on (B, H, W, C)."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def layer_norm(channels):
    """LayerNorm over channels, without weights."""
    return nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)


def space_to_depth(x, patch):
    """(B, H, W, C) -> (B, H/patch, W/patch, C·patch²), channels in nn.PixelUnshuffle's order."""
    return F.pixel_unshuffle(x.permute(0, 3, 1, 2), patch).permute(0, 2, 3, 1)


def depth_to_space(x, patch):
    """(B, h, w, C·patch²) -> (B, h·patch, w·patch, C): the inverse of space_to_depth."""
    return F.pixel_shuffle(x.permute(0, 3, 1, 2), patch).permute(0, 2, 3, 1)


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its spatial L2 norm relative to the mean over channels (ConvNeXt V2's GRN):

        G = ‖x‖₂ over H and W,   N = G / (mean of G over channels + 1e-6),   out = gamma·(x·N) + beta + x
    """

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C). Computes the equivalent x·(1 + gamma·N) + beta, which is faster: with the
        formula as written above, a training step takes 22% longer in Stage B and 37% longer in Stage C (preset tiny,
        float32, two Zen 3 cores)."""
        y = x.float()  # in half precision, sums of squares would overflow or lose digits
        norm = ((y * y).sum(dim=(1, 2), keepdim=True) + 1e-12).sqrt()  # 1e-12 keeps the root's gradient finite at 0
        response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return x * (1 + self.gamma * response).to(x.dtype) + self.beta.to(x.dtype)


class ResBlock(nn.Module):
    """A depthwise 3x3 convolution mixes positions, then an MLP mixes channels. In Stage B, the MLP also reads the
    U-Net's skip connection and the semantic latents, concatenated to its input: `extra_channels` channels in total."""

    def __init__(self, channels, extra_channels=0, dropout=0.0):
        super().__init__()
        self.depthwise = Conv(channels, channels, 3, padding=1, groups=channels)
        self.norm = layer_norm(channels)
        self.expand = nn.Linear(channels + extra_channels, 4 * channels)
        self.grn = GlobalResponseNorm(4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(4 * channels, channels)

    def forward(self, x, skip=None, semantic=None):
        """x (B, H, W, C); skip and semantic (B, H, W, ...) or None -> (B, H, W, C)"""
        h = self.norm(self.depthwise(x))
        return x + self.mlp(torch.cat([y for y in (h, skip, semantic) if y is not None], dim=-1))

    def mlp(self, h):
        """(B, H, W, C + extra_channels) -> (B, H, W, C)"""
        return self.project(self.dropout(self.grn(F.gelu(self.expand(h)))))


class TimestepBlock(nn.Module):
    """Scales and shifts each channel by amounts that depend on the time: x·(1 + scale) + shift. A Linear computes scale
    and shift from the time embedding."""

    def __init__(self, channels, time_width):
        super().__init__()
        self.mapper = nn.Linear(time_width, 2 * channels)

    def forward(self, x, time):
        """x (B, H, W, C), time (B, time_width) -> (B, H, W, C)"""
        scale, shift = self.mapper(time)[:, None, None].chunk(2, dim=-1)  # (B, 1, 1, C) each
        return x * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context, mask=None):
        """x (B, N, C), context (B, M, C), mask: bool, broadcast to (B, heads, N, M), True where x may attend
        -> (B, N, C)"""
        return self.attend(self.q(x), self.k(context), self.v(context), mask)

    def attend(self, q, k, v, mask=None):
        """softmax(q·kᵀ/√d)·v in each head, then the Linear `out`. A head is d = C/heads consecutive channels.
        q (B, N, C), k and v (B, M, C), mask as in `forward` -> (B, N, C)"""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, N or M, d)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class AttnBlock(nn.Module):
    """Self-attention and cross-attention in one: each position attends to all positions and to the text. This is where
    text enters Stages B and C."""

    def __init__(self, channels, cond_width, heads):
        super().__init__()
        self.norm = layer_norm(channels)
        self.kv = nn.Linear(cond_width, channels)
        self.attention = Attention(channels, heads)

    def keys_values(self, text):
        """The text's keys and values: the Linears k and v of `attention`, applied to kv(SiLU(text)). They depend
        neither on the noisy input nor on the time, so sampling computes them only once per image. This saves 11 to 14%
        of the generation time with the included model.
        text (B, L, cond_width) -> keys, values, each (B, L, C)"""
        text = self.kv(F.silu(text))
        return self.attention.k(text), self.attention.v(text)

    def forward(self, x, text_kv):
        """x + attention, where each position of norm(x) attends to all positions of norm(x) and to the text.
        x (B, H, W, C), text_kv: the text's keys and values -> (B, H, W, C)"""
        h = self.norm(x).flatten(1, 2)                                # (B, H·W, C)
        keys = torch.cat([self.attention.k(h), text_kv[0]], dim=1)    # (B, H·W + L, C)
        values = torch.cat([self.attention.v(h), text_kv[1]], dim=1)  # (B, H·W + L, C)
        return x + self.attention.attend(self.attention.q(h), keys, values).view_as(x)


class Block(nn.Module):
    """ResBlock, TimestepBlock and, if `heads` > 0, AttnBlock."""

    def __init__(self, channels, heads, cond_width, time_width, dropout, extra_channels=0):
        super().__init__()
        self.res = ResBlock(channels, extra_channels, dropout)
        self.time = TimestepBlock(channels, time_width)
        self.attn = AttnBlock(channels, cond_width, heads) if heads else None

    def forward(self, x, time, text_kv, skip=None, semantic=None):
        """x (B, H, W, C), the other arguments as the parts expect them -> (B, H, W, C)"""
        x = self.time(self.res(x, skip, semantic), time)
        return x if self.attn is None else self.attn(x, text_kv)


class BlockSequence(nn.ModuleList):
    """`count` Blocks: those of Stage C, or of one level of Stage B. Each ResBlock takes `semantic_width` extra
    channels, and the first one takes another `skip_channels`."""

    def __init__(self, count, channels, heads, cond_width, time_width, dropout, semantic_width=0, skip_channels=0):
        super().__init__(
            Block(channels, heads=heads, cond_width=cond_width, time_width=time_width, dropout=dropout,
                  extra_channels=semantic_width + (skip_channels if i == 0 else 0)) for i in range(count))

    def keys_values(self, text):
        """text (B, L, cond_width) -> per Block, the text's keys and values; None for a Block without attention"""
        return [None if block.attn is None else block.attn.keys_values(text) for block in self]

    def forward(self, x, time, text_kv, skip=None, semantic=None):
        """x (B, H, W, C), time (B, time_width), text_kv: from `keys_values`, skip and semantic (B, H, W, ...)
        -> (B, H, W, C)"""
        for block, kv in zip(self, text_kv):
            x = block(x, time, kv, skip, semantic)
            skip = None
        return x

    def scale_branches(self, total):
        """Part of the initialisation: scales the weights of each ResBlock's last Linear by √(1/total), and makes each
        TimestepBlock the identity. total: the network's number of Blocks (Stage B: those on the way down)."""
        for block in self:
            block.res.project.weight.data *= (1 / total) ** 0.5
            nn.init.zeros_(block.time.mapper.weight)


def time_embedding(t, width):
    """Sines, then cosines, of 10000·t times the frequencies exp(−ln(10000)·k/(width/2 − 1)), k = 0, 1, ...
    t (B,) in [0, 1] -> (B, width)"""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
    angles = t[:, None] * 10000 * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def init_weights(module):
    """Xavier-uniform weights and zero biases. (The authors keep PyTorch's defaults for transposed convolutions,
    initialise q, k and v as one matrix, and use a standard deviation of 0.02 for Stage C's input and text mappers.)"""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Text: CLIP's text transformer, and the contrastive model that trains it (Radford et al., 2021).


class TextLayer(nn.Module):
    """A pre-LayerNorm transformer layer."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width)
        self.attention = Attention(cfg.width, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.width)
        self.expand = nn.Linear(cfg.width, cfg.mlp_width)
        self.project = nn.Linear(cfg.mlp_width, cfg.width)

    def forward(self, x, mask):
        """x (B, L, width), mask (B, 1, L, L): True where a token may attend -> (B, L, width)"""
        h = self.norm1(x)
        x = x + self.attention(h, h, mask)
        return x + self.project(F.gelu(self.expand(self.norm2(x))))


class TextEncoder(nn.Module):
    """Token ids to one vector per token: CLIP's last hidden state. Stages B and C attend to all of it, padding
    included."""

    def __init__(self, cfg):
        super().__init__()
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.width)
        self.positions = nn.Parameter(torch.zeros(cfg.length, cfg.width))
        self.layers = nn.ModuleList(TextLayer(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width)
        self.apply(init_weights)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, ids, mask):
        """Adds token and position embeddings, then applies the layers and the last LayerNorm. Attention is causal and
        ignores padding: each position, padding included, attends only to the caption's own tokens up to that position.
        ids (B, L), mask (B, L): True for the caption's own tokens, False for padding -> (B, L, width)"""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]                                        # (B, L, width)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()  # (L, L)
        visible = causal & mask[:, None, None]                                                       # (B, 1, L, L)
        for layer in self.layers:
            x = layer(x, visible)
        return self.norm(x)


class CLIP(nn.Module):
    """A text encoder and an image encoder that learn which caption belongs to which image. Stages B and C use the text
    encoder; Stage B's compressor starts from the image encoder (the authors' starts from ImageNet weights)."""

    def __init__(self, config):
        super().__init__()
        width, features, self.rescale = config.text_b.width, config.compressor.features, config.rescale
        self.text = TextEncoder(config.text_b)
        self.image = EfficientNet(config.compressor)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.image_projection = nn.Linear(9 * features, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_text(self, ids, mask):
        """The projection of the end token's vector, scaled to length 1. Attention is causal, so the end
        token, the last one, is the only token of the caption that has seen all of it.
        ids and mask (N, L) -> unit vectors (N, width)"""
        end = mask.sum(dim=1) - 1
        text = self.text(ids, mask)[torch.arange(len(ids), device=ids.device), end]
        return F.normalize(self.text_projection(text).float(), dim=-1)

    def image_features(self, images):
        """images (B, H, W, 3) in [0, 1] -> features of the image's 3x3 parts (B, 9, features). The parts are
        kept separate, because their mean would not say where in the image something is."""
        features = self.image(rescaled(images, self.rescale)).permute(0, 3, 1, 2)  # (B, features, hs, ws)
        parts = F.adaptive_avg_pool2d(features.cpu() if features.is_mps else features, 3)  # MPS can't pool 2 cells to 3
        return parts.flatten(2).mT.to(features.device)

    def embed_images(self, images):
        """images (B, H, W, 3) in [0, 1] -> unit vectors (B, width)"""
        return F.normalize(self.image_projection(self.image_features(images).flatten(1)).float(), dim=-1)

    def compare(self, image, text):
        """The cosines times exp(logit_scale), which is limited to 100.
        Unit vectors (B, width), (N, width) -> logits (B, N): row i says how well image i fits each caption"""
        return self.logit_scale.exp().clamp(max=100) * image @ text.T

    def forward(self, images, ids, mask):
        """images (B, H, W, 3) in [0, 1], ids and mask (N, L) -> logits (B, N)"""
        return self.compare(self.embed_images(images), self.embed_text(ids, mask))


def contrastive_loss(logits, ids):
    """CLIP's loss: the mean of two cross-entropies. The first chooses each image's caption among all N captions; the
    second chooses, for each of the first B captions, its image among the B images. In the first, identical captions
    all count as correct and share the target equally; in the second, so do the images of identical captions.
    logits (B, N), ids (N, L): the images' own captions, then wrong ones close to them (hard negatives) -> scalar"""
    B = len(logits)
    same = (ids[:B, None] == ids[None]).all(dim=-1).float()           # (B, N)
    per_image = same / same.sum(dim=1, keepdim=True)                  # (B, N)
    per_caption = same[:, :B] / same[:, :B].sum(dim=1, keepdim=True)  # (B, B)
    return (F.cross_entropy(logits, per_image) + F.cross_entropy(logits[:, :B].T, per_caption)) / 2


# ----------------------------------------------------------------------------------------------------------------------
# 4. Stage A: a VQGAN with a stride of 4 (section 3.1, appendix E.1; Esser et al., 2021).


class VQBlock(nn.Module):
    """Depthwise convolution and MLP as residual branches, with six learned scalars g that start at 0:

        x += depthwise(LN(x)·(1 + g0) + g1)·g2,   x += MLP(LN(x)·(1 + g3) + g4)·g5
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = layer_norm(channels)
        self.depthwise = Conv(channels, channels, 3, padding=1, padding_mode="replicate", groups=channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)"""
        g = self.gammas
        x = x + self.depthwise(self.norm(x) * (1 + g[0]) + g[1]) * g[2]
        h = F.gelu(self.expand(self.norm(x) * (1 + g[3]) + g[4]))
        return x + self.project(h) * g[5]


class Quantizer(nn.Module):
    """Replaces each latent vector by its nearest codebook entry (van den Oord et al., 2017)."""

    def __init__(self, codebook_size, channels):
        super().__init__()
        bound = 1 / codebook_size
        self.codebook = nn.Parameter(torch.empty(codebook_size, channels).uniform_(-bound, bound))

    def forward(self, x):
        """x (B, h, w, C) -> quantized (B, h, w, C), codes (B, h, w) int64, loss: scalar

        loss = mean (q − sg(x))² + 0.25·mean (x − sg(q))², where sg stops the gradient. The first term moves the
        codebook towards the latents; the second moves the latents towards the codebook (commitment). The gradient of
        `quantized` goes straight through to x."""
        with torch.autocast(x.device.type, enabled=False):  # finding the nearest entry needs float32
            codes = torch.cdist(x.detach().float().flatten(0, 2), self.codebook.detach().float()).argmin(dim=1)
        codes = codes.view(x.shape[:-1])
        quantized = F.embedding(codes, self.codebook)
        loss = F.mse_loss(quantized, x.detach()) + 0.25 * F.mse_loss(x, quantized.detach())
        return x + (quantized - x).detach(), codes, loss


class VQGAN(nn.Module):
    """Images to latents and back. Since the paper's second version, Stage B works on the latents *before*
    quantization."""

    def __init__(self, config):
        super().__init__()
        cfg, (narrow, wide) = config.a, config.a.channels
        self.register_buffer("scale", torch.tensor(cfg.scale))
        self.from_pixels = nn.Linear(3 * 4, narrow)
        self.encoder = nn.Sequential(VQBlock(narrow), Conv(narrow, wide, 4, stride=2, padding=1), VQBlock(wide))
        self.to_latents = nn.Linear(wide, config.latent_channels, bias=False)
        self.latent_norm = nn.BatchNorm1d(config.latent_channels)  # mean 0, standard deviation 1 at first; then learned
        self.quantizer = Quantizer(cfg.codebook_size, config.latent_channels)
        self.from_latents = nn.Linear(config.latent_channels, wide)
        self.decoder = nn.Sequential(*(VQBlock(wide) for _ in range(cfg.blocks)),
                                     ConvUp(wide, narrow, 4, stride=2, padding=1), VQBlock(narrow))
        self.to_pixels = nn.Linear(narrow, 3 * 4)

    def encode(self, images):
        """images (B, H, W, 3) in [0, 1] -> latents before quantization (B, H/4, W/4, 4)"""
        x = self.from_pixels(space_to_depth(images, 2))      # (B, H/2, W/2, narrow)
        x = self.to_latents(self.encoder(x))                 # (B, H/4, W/4, 4)
        return self.latent_norm(x.flatten(0, 2)).view_as(x)

    def decode(self, latents):
        """latents (B, h, w, 4), quantized or not -> images (B, 4h, 4w, 3), not clamped"""
        x = self.decoder(self.from_latents(latents))         # (B, 2h, 2w, narrow)
        return depth_to_space(self.to_pixels(x), 2)          # (B, 4h, 4w, 3)

    def forward(self, images):
        """images (B, H, W, 3) in [0, 1] -> reconstruction (B, H, W, 3), latents (B, H/4, W/4, 4),
        codes (B, H/4, W/4), the quantizer's loss"""
        latents = self.encode(images)
        quantized, codes, loss = self.quantizer(latents)
        return self.decode(quantized), latents, codes, loss


class Discriminator(nn.Module):
    """PatchGAN discriminator: one logit per patch. This is Paella's discriminator, which the
    authors use, but without its sigmoid, because our adversarial loss is the hinge loss."""

    def __init__(self, depth, width):
        super().__init__()
        layers, channels = [], 3
        for i in range(depth):
            out = width // 2 ** max(depth - 3 - i, 0)
            layers.append(spectral_norm(nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=i == 0)))
            if i > 0:
                layers.append(nn.InstanceNorm2d(out))  # removes the mean, so the convolution needs no bias
            layers.append(nn.LeakyReLU(0.2))
            channels = out
        self.net = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, images):
        """images (B, H, W, 3) in [0, 1] -> logits (B, 1, h, w), each side halved `depth` times; positive: real"""
        return self.net(images.permute(0, 3, 1, 2) * 2 - 1)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Semantic compressor: EfficientNetV2 (Tan and Le, 2021) and a mapper to 16 channels (sections 3.1 and 3.4).
# Its blocks are ordinary NCHW layers, because BatchNorm2d requires that order. Input and output are (B, H, W, C), as
# everywhere else.


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution that stays in float32 on a CPU. In bfloat16, the backward pass of a strided one takes
    ten times as long there, which amounts to 15% of a training step of Stage B."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float() if x.device.type == "cpu" else x)


def conv_norm(c_in, c_out, kernel, stride=1, groups=1, activation=True):
    """Convolution, BatchNorm and, unless switched off, SiLU."""
    conv = nn.Conv2d if groups == 1 else DepthwiseConv
    layers = [conv(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
              nn.BatchNorm2d(c_out, eps=1e-3)]
    return nn.Sequential(*layers, nn.SiLU()) if activation else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Weights each channel by a function of all channels' means over the image."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.squeeze = nn.Linear(channels, squeezed)
        self.excite = nn.Linear(squeezed, channels)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)"""
        weight = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean(dim=(2, 3))))))
        return x * weight[:, :, None, None]


class MBConv(nn.Module):
    """Expansion, depthwise 3x3 convolution, squeeze-excitation and projection. If `fused`, one full 3x3 convolution
    replaces the first two, and there is no squeeze-excitation (and no projection either if `expansion` is 1). In
    training, the residual branch is dropped for each image with probability `drop` (stochastic depth)."""

    def __init__(self, c_in, c_out, expansion, stride, fused, drop):
        super().__init__()
        self.residual = stride == 1 and c_in == c_out
        self.drop = drop
        wide = c_in * expansion
        if fused and expansion == 1:
            layers = [conv_norm(c_in, c_out, 3, stride)]
        elif fused:
            layers = [conv_norm(c_in, wide, 3, stride), conv_norm(wide, c_out, 1, activation=False)]
        else:
            layers = [conv_norm(c_in, wide, 1), conv_norm(wide, wide, 3, stride, groups=wide),
                      SqueezeExcitation(wide, max(1, c_in // 4)), conv_norm(wide, c_out, 1, activation=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        """(B, c_in, H, W) -> (B, c_out, H/stride, W/stride)"""
        h = self.layers(x)
        if not self.residual:
            return h
        if self.training and self.drop > 0:
            keep = torch.rand(len(h), 1, 1, 1, device=h.device) >= self.drop
            h = h * keep / (1 - self.drop)  # keeps the expected value
        return x + h


class EfficientNet(nn.Module):
    """EfficientNetV2's features, with a stride of 32."""

    def __init__(self, cfg):
        super().__init__()
        stages = [conv_norm(3, cfg.stem, 3, 2)]
        channels, total, done = cfg.stem, sum(stage[-1] for stage in cfg.stages), 0
        for kind, expansion, stride, out, count in cfg.stages:
            blocks = []
            for i in range(count):
                blocks.append(MBConv(channels, out, expansion, stride if i == 0 else 1, fused=kind == "fused",
                                     drop=cfg.stochastic_depth * done / total))
                channels, done = out, done + 1
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages, conv_norm(channels, cfg.features, 1))

    def forward(self, images):
        """images (B, H, W, 3) in [0, 1] -> features (B, ⌈H/32⌉, ⌈W/32⌉, features)"""
        mean, std = images.new_tensor([0.485, 0.456, 0.406]), images.new_tensor([0.229, 0.224, 0.225])  # ImageNet's
        x = ((images - mean) / std).permute(0, 3, 1, 2)
        x = x.contiguous() if x.is_mps else x  # on MPS, BatchNorm's gradients are wrong for channels last
        return self.stages(x).permute(0, 2, 3, 1)


class SemanticCompressor(nn.Module):
    """A rescaled image to a few semantic latents: 128 px -> 96 px -> 3x3x16."""

    def __init__(self, config):
        super().__init__()
        self.backbone = EfficientNet(config.compressor)
        self.mapper = nn.Linear(config.compressor.features, config.semantic_channels, bias=False)
        self.norm = nn.BatchNorm1d(config.semantic_channels)

    def forward(self, images):
        """images (B, H, W, 3) in [0, 1], already rescaled -> semantic latents (B, ⌈H/32⌉, ⌈W/32⌉, 16)"""
        x = self.mapper(self.backbone(images))
        return self.norm(x.flatten(0, 2)).view_as(x)


def resize(images, height, width, align_corners=False):
    """Bicubic with anti-aliasing. (B, H, W, C) -> (B, height, width, C)"""
    x = images.permute(0, 3, 1, 2).float()
    x = F.interpolate(x.cpu() if x.is_mps else x, (height, width), mode="bicubic", antialias=True,
                      align_corners=align_corners)  # MPS lacks this, or its gradient
    return x.permute(0, 2, 3, 1).to(images.device)


def rescaled(images, scale):
    """Images as the compressor sees them, with the scale `Config.rescale`. (B, H, W, 3) -> (B, scale·H, scale·W, 3)"""
    return resize(images, round(scale * images.shape[1]), round(scale * images.shape[2]))


# ----------------------------------------------------------------------------------------------------------------------
# 6. Stage B: from semantic latents and text to Stage A's latents, by a diffusion U-Net (section 3.1, appendix E.2).


class StageB(nn.Module):
    """Predicts eps in noisy latents of Stage A, given the semantic latents and the text."""

    def __init__(self, config):
        super().__init__()
        self.cfg, self.time_width = config.b, config.time_width
        cfg, widths, depth = config.b, config.b.channels, len(config.b.channels)

        def level(i, skip_channels=0):
            return BlockSequence(cfg.blocks[i], widths[i], heads=cfg.heads[i], cond_width=cfg.cond_width,
                                 time_width=config.time_width, dropout=cfg.dropout, skip_channels=skip_channels,
                                 semantic_width=cfg.cond_width if cfg.sees_semantic[i] else 0)

        self.text_mapper = nn.Linear(config.text_b.width, cfg.cond_width)
        self.text_norm = layer_norm(cfg.cond_width)
        self.embed = nn.Linear(config.latent_channels * cfg.patch**2, widths[0])
        self.embed_norm = layer_norm(widths[0])
        down, up = range(depth), range(depth - 1, -1, -1)  # the U-Net's levels, in the order they run
        self.downscale = nn.ModuleList(
            nn.Sequential(layer_norm(widths[i - 1]), Conv(widths[i - 1], widths[i], 2, stride=2)) for i in down[1:])
        self.down = nn.ModuleList(level(i) for i in down)
        self.up = nn.ModuleList(level(i, widths[i] if i < depth - 1 else 0) for i in up)
        self.upscale = nn.ModuleList(
            nn.Sequential(layer_norm(widths[i]), ConvUp(widths[i], widths[i - 1], 2, stride=2)) for i in up[:-1])
        # One per level and direction; None for a level that does not see the semantic latents.
        self.semantic_mappers = nn.ModuleList(
            nn.Linear(config.semantic_channels, cfg.cond_width) if cfg.sees_semantic[i] else None for i in (*down, *up))
        self.out_norm = layer_norm(widths[0])
        self.out = nn.Linear(widths[0], 2 * config.latent_channels * cfg.patch**2)

        self.apply(init_weights)
        nn.init.normal_(self.text_mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.embed.weight, gain=0.02)
        nn.init.zeros_(self.out.weight)
        for blocks in (*self.down, *self.up):
            blocks.scale_branches(total=sum(cfg.blocks))
        for mapper in filter(None, self.semantic_mappers):
            # The authors use a standard deviation of 0.02. That is too weak for a short run: B would ignore the
            # semantic latents for thousands of steps.
            nn.init.normal_(mapper.weight, std=0.5)

    def forward(self, x, t, semantic, text):
        """x: noisy latents (B, h, w, 4), t (B,) in [0, 1], semantic (B, hs, ws, 16), text (B, L, text width)
        -> predicted eps (B, h, w, 4). h and w must be multiples of patch·2^(levels-1)."""
        return self.predict_eps(x, t, self.encode_conditions(semantic, text, x.shape[1:3]))

    def encode_conditions(self, semantic, text, size):
        """Computes everything that does not depend on x or t; sampling does this once per image. For each level on the
        way down, then up, the result holds the semantic latents (mapped, at the level's size; None if the level does
        not see them) and the text's keys and values.
        semantic (B, hs, ws, 16), text (B, L, text width), size (h, w) of x -> a list for `predict_eps`"""
        text, conditions, depth = self.text_norm(self.text_mapper(text)), [], len(self.down)  # (B, L, cond_width)
        levels = (*range(depth), *reversed(range(depth)))  # in the order they run: down, then up
        for level, blocks, mapper in zip(levels, (*self.down, *self.up), self.semantic_mappers):
            h, w = (n // self.cfg.patch // 2**level for n in size)
            # align_corners: the corner cells of the small grid sit on the corner cells of the large one.
            mapped = None if mapper is None else mapper(resize(semantic, h, w, align_corners=True))
            conditions.append((mapped, blocks.keys_values(text)))                           # (B, h, w, cond_width), ...
        return conditions

    def predict_eps(self, x, t, conditions):
        """x (B, h, w, 4), t (B,), conditions: from `encode_conditions` -> predicted eps (B, h, w, 4)"""
        h = self.out(self.unet(x, t, conditions))                  # (B, h/patch, w/patch, 2·4·patch²)
        # Instead of eps, the network outputs `a`, the clean part of x, and `b`, the size of the noise in x. eps follows
        # from x = a + b·eps (the authors' parametrisation). The last layer starts at zero, so that a = 0, b = 1/2 and
        # eps = 2·x. Near t = 1, this eps has the right direction even before training. The loss sees only eps, so it
        # does not directly train a to be the clean part. b is kept away from zero, which makes the division safe.
        a, b = depth_to_space(h, self.cfg.patch).chunk(2, dim=-1)  # (B, h, w, 4) each
        b = b.float().sigmoid() * (1 - 2e-3) + 1e-3
        return (x - a) / b

    def unet(self, x, t, conditions):
        """All but the last layer. x (B, h, w, channels), the rest as in `predict_eps`
        -> (B, h/patch, w/patch, channels of the first level)"""
        time, depth, skips = time_embedding(t, self.time_width), len(self.down), []
        h = self.embed_norm(self.embed(space_to_depth(x, self.cfg.patch)))  # (B, h/patch, w/patch, channels[0])
        for i, (blocks, (semantic, text_kv)) in enumerate(zip(self.down, conditions[:depth])):
            if i > 0:
                h = self.downscale[i - 1](h)              # half as high and wide, channels[i]
            h = blocks(h, time, text_kv, semantic=semantic)
            skips.append(h)
        skips[-1] = None  # the lowest level's output is h itself
        for i, (blocks, (semantic, text_kv)) in enumerate(zip(self.up, conditions[depth:])):
            h = blocks(h, time, text_kv, skip=skips.pop(), semantic=semantic)
            if i < len(self.upscale):
                h = self.upscale[i](h)                    # twice as high and wide
        return self.out_norm(h)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Stage C: from text to semantic latents (sections 3.2 and 3.4, appendix E.3). Its grid is so small that no U-Net is
# needed.


class StageC(nn.Module):
    """Predicts eps in noisy semantic latents, given the text, which `text_mapper` maps to the width of the blocks and
    which enters each of them through its AttnBlock."""

    def __init__(self, config):
        super().__init__()
        cfg, self.time_width = config.c, config.time_width
        # Training measures these two. They normalise the semantic latents before Stage C sees them.
        self.register_buffer("latent_mean", torch.zeros(config.semantic_channels))
        self.register_buffer("latent_std", torch.ones(config.semantic_channels))
        self.text_mapper = nn.Sequential(nn.Linear(config.text_c.width, cfg.width), nn.LeakyReLU(0.2),
                                         nn.Linear(cfg.width, cfg.width))
        self.embed = nn.Linear(config.semantic_channels, cfg.width)
        self.blocks = BlockSequence(cfg.depth, cfg.width, heads=cfg.heads, cond_width=cfg.width,
                                    time_width=config.time_width, dropout=cfg.dropout)
        self.out_norm = layer_norm(cfg.width)
        self.out = nn.Linear(cfg.width, 2 * config.semantic_channels)

        self.apply(init_weights)
        nn.init.zeros_(self.out.weight)
        self.blocks.scale_branches(total=cfg.depth)

    def normalise(self, semantic):
        """Semantic latents as the compressor gives them -> as Stage C diffuses them. (B, h, w, 16)"""
        return (semantic - self.latent_mean) / self.latent_std

    def denormalise(self, x):
        """The inverse of `normalise`."""
        return x * self.latent_std + self.latent_mean

    def forward(self, x, t, text):
        """x: noisy, normalised semantic latents (B, h, w, 16), t (B,) in [0, 1], text (B, L, text width)
        -> predicted eps (B, h, w, 16)"""
        return self.predict_eps(x, t, self.encode_conditions(text))

    def encode_conditions(self, text):
        """The text's keys and values in each Block, computed once per image. text (B, L, text width)
        -> a list for `predict_eps`"""
        return self.blocks.keys_values(self.text_mapper(text))

    def predict_eps(self, x, t, conditions):
        """embed, blocks, out_norm and out give a and b, the first and the second half of the channels. Then

            eps = (x − a)/(|1 − b| + 1e-5)

        The last layer starts at zero, so at first a = b = 0 and eps is x, nearly right when x is almost pure noise.
        As in Stage B, x = a + (size of the noise)·eps, but here the size is |1 − b| + 1e-5.
        x (B, h, w, 16), t (B,), conditions: from `encode_conditions` -> predicted eps (B, h, w, 16)"""
        h = self.blocks(self.embed(x), time_embedding(t, self.time_width), conditions)  # (B, h, w, width)
        a, b = self.out(self.out_norm(h)).chunk(2, dim=-1)                              # (B, h, w, 16) each
        return (x - a) / ((1 - b.float()).abs() + 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# 8. Diffusion, the same for B and C (sections 3.2 and 3.3; authors' code). Loss and sampling use only eps.
#
# Skip this on a first reading: to switch to v-prediction, v = √ᾱ·eps − √(1 − ᾱ)·x0, change both StageB and StageC:
#
#     out            without the factor 2, since there is one output, v, in place of two, a and b
#     predict_eps    returns √ᾱ·v + √(1 − ᾱ)·x, which is eps, in place of what it computes from a and b (ᾱ has the shape
#                    (B, 1, 1, 1), as in `add_noise`)
#
# Then train the two again (`python train.py b`, then `c`); weights trained before no longer fit. Because
# (error of eps)² = ᾱ·(error of v)², the loss weight 1 − ᾱ on eps is a weight of ᾱ·(1 − ᾱ) on v. For an unweighted loss
# on v, change the weight in `diffusion_loss` to 1/ᾱ. (`stage_b_loss` multiplies the weight by a factor of its own.)


def alpha_bar(t):
    """The share of the signal's variance left at time t, by the cosine schedule with s = 0.008:

        ᾱ(t) = cos²((t + s)/(1 + s)·π/2) / cos²(s/(1 + s)·π/2)

    t: tensor in [0, 1] -> same shape, clamped to [0.0001, 0.9999]"""
    s = 0.008
    start = math.cos(s / (1 + s) * math.pi / 2) ** 2
    return (torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / start).clamp(0.0001, 0.9999)


def add_noise(x0, eps, t):
    """x_t = √ᾱ·x0 + √(1 − ᾱ)·eps. x0 and eps (B, ...), t (B,) -> (B, ...)"""
    signal = alpha_bar(t).view(-1, *[1] * (x0.dim() - 1))
    return signal.sqrt() * x0 + (1 - signal).sqrt() * eps


def training_times(n, device):
    """Random training times. They are uniform up to 1.081 and then clamped, so that 7.5% of them are exactly 1, the
    time at which sampling begins. -> (n,)"""
    return ((1 - torch.rand(n, device=device)) * 1.08 + 0.001).clamp(0.001, 1.0)


def diffusion_loss(eps, predicted, t, factor=1.0):
    """Each image's mean of factor·(1 − ᾱ(t))·(eps − predicted)². The weight 1 − ᾱ is P2, (1 + ᾱ/(1 − ᾱ))⁻¹ (Choi et
    al., 2022, k = gamma = 1), as in the authors' code, which trained the published weights. Section 3.2 prints
    (1 − ᾱ)/(1 + ᾱ). eps and predicted (B, ...), t (B,), factor: (B,) or a number -> (B,)"""
    return factor * (1 - alpha_bar(t)) * (eps - predicted).square().flatten(1).mean(dim=1)


def predict_x0(x, eps, t):
    """The clean value that follows from x at time t and the predicted eps: (x − √(1 − ᾱ)·eps)/√ᾱ.
    x and eps: of one shape, t: scalar tensor -> that shape"""
    signal = alpha_bar(t)
    return (x - (1 - signal).sqrt() * eps) / signal.sqrt()


def ddpm_step(x, eps, t, t_next, z):
    """One DDPM step (Ho et al., 2020) from time t to t_next < t. With α = ᾱ(t)/ᾱ(t_next):

        mean = (x − (1 − α)·eps/√(1 − ᾱ(t)))/√α,   std = √((1 − α)(1 − ᾱ(t_next))/(1 − ᾱ(t))), 0 at t_next = 0

    x, the predicted eps and normal noise z: all of one shape; t and t_next: scalar tensors -> x at t_next"""
    now, after = alpha_bar(t), alpha_bar(t_next)
    alpha = now / after
    mean = (x - (1 - alpha) * eps / (1 - now).sqrt()) / alpha.sqrt()
    std = ((1 - alpha) * (1 - after) / (1 - now)).sqrt()
    return mean + std * z * (t_next != 0)


def ddim_step(x, eps, t, t_next):
    """One DDIM step (Song et al., 2021), which adds no noise: √ᾱ(t_next)·x0 + √(1 − ᾱ(t_next))·eps -> x at t_next"""
    after = alpha_bar(t_next)
    return after.sqrt() * predict_x0(x, eps, t) + (1 - after).sqrt() * eps


def random_numbers(draw, shape, generator, device):
    """Random numbers (B, ...) from `draw` (torch.rand or torch.randn). They are drawn on the generator's device, so
    that a seed gives the same numbers on every device. generator: one for the batch (None: PyTorch's own), or a list
    of B, one per image, which makes an image independent of the rest of the batch."""
    if isinstance(generator, list):
        return torch.cat([random_numbers(draw, (1, *shape[1:]), one, device) for one in generator])
    return draw(shape, generator=generator, device=generator.device if generator else device).to(device)


def normal_noise(shape, generator, device):
    """Normal noise (B, H, W, C), drawn in NCHW order, so that a seed gives the same image as in diffusers."""
    B, H, W, C = shape
    return random_numbers(torch.randn, (B, C, H, W), generator, device).permute(0, 2, 3, 1).contiguous()


def generators(seed, count):
    """seed: None, an int for the whole batch, or a list of `count` ints, one per image -> what `random_numbers` takes
    as `generator`"""
    if seed is None:
        return None
    if isinstance(seed, int):
        return torch.Generator().manual_seed(seed)
    if len(seed) != count:
        raise ValueError(f"{count} images, but {len(seed)} seeds")
    return [torch.Generator().manual_seed(one) for one in seed]


def timesteps(steps, device):
    """steps: the number of steps, for times evenly spaced from 1 to 0; or "fast", the authors' short list for Stage C:
    19 steps down to 2/3, ten more to 0 -> decreasing tensor, (steps + 1,) or, for "fast", (30,)"""
    if steps == "fast":
        return torch.tensor([1 - i / 57 for i in range(20)] + [(10 - i) / 15 for i in range(1, 11)], device=device)
    return torch.linspace(1, 0, steps + 1, device=device)


def guided(network, x, t, conditions, guidance):
    """The network's prediction with classifier-free guidance (Ho and Salimans, 2022):

        unconditional + guidance·(conditional − unconditional)

    network(x, t, conditions), x (B, ...), t: scalar tensor; conditions: B rows; if guidance is not 1, 2·B rows: the
    conditional ones, then the unconditional ones -> the network's prediction for B rows"""
    if guidance == 1:
        return network(x, t.expand(len(x)), conditions)
    conditional, unconditional = network(torch.cat([x, x]), t.expand(2 * len(x)), conditions).chunk(2)
    return torch.lerp(unconditional, conditional, guidance)


@torch.no_grad()
def sample(network, x, times, conditions, guidance=1.0, generator=None, sampler="ddpm", after_step=None):
    """The sampling loop (section 3.3).

    network(x, t, conditions) -> eps; x (B, H, W, C): what to start from, at times[0]; times: decreasing to 0, (n + 1,);
    conditions and guidance: see `guided`; generator: for the `normal_noise` of each DDPM step, including the last,
    where its factor is 0; sampler: "ddpm" or "ddim" (ValueError for any other); after_step(x, x0, t_next) -> new x:
    called after each step, where x0 is what was predicted before the step, and t_next is the time reached.
    -> (B, H, W, C)"""
    for t, t_next in zip(times[:-1], times[1:]):
        eps = guided(network, x, t, conditions, guidance)  # (B, H, W, C)
        x0 = predict_x0(x, eps, t)                         # (B, H, W, C)
        if sampler == "ddpm":
            x = ddpm_step(x, eps, t, t_next, normal_noise(x.shape, generator, x.device))
        elif sampler == "ddim":
            x = ddim_step(x, eps, t, t_next)
        else:
            raise ValueError(f"unknown sampler {sampler}")
        if after_step is not None:
            x = after_step(x, x0, t_next)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# 9. Wuerstchen: all of it together.

STAGES = {  # stages of training, in this order ("text": CLIP): the networks in each stage's file, <stage>.pt
    "text": ("text_b", "compressor"),  # CLIP's two encoders; its image encoder is the new compressor's backbone
    "a": ("a",),
    "b": ("compressor", "b"),
    "c": ("text_c", "c"),  # Stage C trains its own copy of the text encoder
}


def add_negatives(prompts, negative):
    """Appends the negative prompts to the prompts, for the unconditional branch. `negative` is one string for all
    prompts, or one per prompt. The callers' default, "", is the null caption used in training."""
    return prompts + ([negative] * len(prompts) if isinstance(negative, str) else negative)


def latent_size_of(images):
    """The size (h, w) of Stage A's latents for images (B, H, W, 3)."""
    return [side // 4 for side in images.shape[1:3]]


class Wuerstchen(nn.Module):
    """The whole system: text encoders, Stage C, Stage B, Stage A and the compressor."""

    def __init__(self, config, tokenizer, tokenizer_b=None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.tokenizer_b = tokenizer_b or tokenizer
        self.text_c = TextEncoder(config.text_c)
        self.text_b = TextEncoder(config.text_b)
        self.a = VQGAN(config)
        self.compressor = SemanticCompressor(config)
        self.b = (TokenStageB if config.b.token_width else StageB)(config)
        self.c = StageC(config)

    @property
    def device(self):
        return self.c.latent_mean.device

    def encode_text(self, prompts, stage):
        """prompts: list of strings; stage: "b" or "c", the stage whose text encoder is used -> (B, L, width)"""
        encoder, tokenizer = (self.text_b, self.tokenizer_b) if stage == "b" else (self.text_c, self.tokenizer)
        ids, mask = tokenizer(prompts)
        return encoder(ids.to(self.device), mask.to(self.device))

    def times(self, steps, stage):
        """steps: as `timesteps` takes them, or None for `config.steps`; stage "b" or "c" -> its sampling times"""
        return timesteps(self.config.steps[0 if stage == "c" else 1] if steps is None else steps, self.device)

    def compress(self, images):
        """images (B, H, W, 3) in [0, 1] -> semantic latents (B, hs, ws, 16). Raises UserError if a side is not a
        multiple of `config.stride`, or if the model was loaded without the published compressor."""
        H, W = images.shape[1:3]
        if H % self.config.stride or W % self.config.stride:
            raise UserError(f"image sides must be multiples of {self.config.stride}, not {H}x{W}")
        if self.compressor is None:
            raise UserError("no EfficientNetEncoder was loaded with this model: it is needed to compress images")
        return self.compressor(rescaled(images, self.config.rescale)).float()

    @torch.no_grad()
    def sample_c(self, x, times, prompts, negative="", guidance=None, **options):
        """Stage C. x: what to start from at times[0], usually noise (B, hs, ws, 16); prompts: one per image; negative:
        one string for all images (by default the null caption ""), or one per image; guidance: the guidance scale
        (None: `config.guidance`); options: those of `sample` -> semantic latents (B, hs, ws, 16)"""
        guidance = self.config.guidance[0] if guidance is None else guidance
        if guidance != 1:
            prompts = add_negatives(prompts, negative)
        conditions = self.c.encode_conditions(self.encode_text(prompts, "c"))
        return self.c.denormalise(sample(self.c.predict_eps, x, times, conditions, guidance, **options))

    @torch.no_grad()
    def sample_b(self, x, times, semantic, prompts, negative="", guidance=None, **options):
        """Stage B. x: noise (B, h, w, 4), or random codes (B, h, w) for a TokenStageB; semantic (B, hs, ws, 16); the
        rest as in `sample_c`. The unconditional branch sees the negative prompt, and zeros as semantic latents.
        -> Stage A's latents (B, h, w, 4)"""
        guidance = self.config.guidance[1] if guidance is None else guidance
        if guidance != 1:
            prompts = add_negatives(prompts, negative)
            semantic = torch.cat([semantic, torch.zeros_like(semantic)])
        conditions = self.b.encode_conditions(semantic, self.encode_text(prompts, "b"), x.shape[1:3])
        if self.config.b.token_width:
            options.pop("sampler", None)  # tokens have only one sampler
            codes = sample_tokens(self.b.predict_logits, x, times, conditions, guidance, **options)
            return self.a.quantizer.codebook[codes]
        return sample(self.b.predict_eps, x, times, conditions, guidance, **options) * self.a.scale

    @torch.no_grad()
    def from_semantic(self, semantic, prompts, latent_size=None, steps=None, generator=None, **options):
        """Stages B and A. semantic (B, hs, ws, 16), prompts: one per image, latent_size (h, w): of Stage A's latents
        (None: as trained), options: those of `sample_b` -> images (B, 4h, 4w, 3) in [0, 1]"""
        shape = len(prompts), *(latent_size or [self.config.image_size // 4] * 2), self.config.latent_channels
        if self.config.b.token_width:
            x = (random_numbers(torch.rand, shape[:3], generator, self.device) * self.config.a.codebook_size).long()
        else:
            x = normal_noise(shape, generator, self.device)
        latents = self.sample_b(x, self.times(steps, "b"), semantic, prompts, generator=generator, **options)
        return self.a.decode(latents).float().clamp(0, 1)

    def generate(self, prompts, negative="", size=None, steps=(None, None), guidance=(None, None), seed=None,
                 **options):
        """Generates an image per prompt: Stage C, then B, then A.

        prompts: list of strings; negative: one string for all prompts, or one per prompt; size (height, width) in
        pixels (None: as trained), rounded to a size that the stages can generate; steps and guidance: the numbers of
        steps and the guidance scales of Stages C and B (None: the config's); seed: an int (random numbers as in
        diffusers' WuerstchenCombinedPipeline), or a list with one int per image; options: `sampler` and `after_step` of
        `sample`, for Stage C and then for Stage B -> one image per prompt (B, H, W, 3) in [0, 1]"""
        semantic_size, latent_size = self.config.grid(*(size or [self.config.image_size] * 2))
        generator = generators(seed, len(prompts))
        x = normal_noise((len(prompts), *semantic_size, self.config.semantic_channels), generator, self.device)
        semantic = self.sample_c(x, self.times(steps[0], "c"), prompts, negative=negative, guidance=guidance[0],
                                 generator=generator, **options)                  # (B, hs, ws, 16)
        return self.from_semantic(semantic, prompts, latent_size, negative=negative, steps=steps[1],
                                  guidance=guidance[1], generator=generator, **options)

    @torch.no_grad()
    def reconstruct(self, images, prompts=None, seed=None, **options):
        """Reconstructs images twice: by Stage A alone, and from the semantic latents by B and A. images (B, H, W, 3) in
        [0, 1], sides multiples of `config.stride`; prompts: captions for Stage B, one per image ("" if None); options:
        those of `from_semantic` -> the first (stride 4, quantized) and the second, both of the same shape as images"""
        from_b = self.from_semantic(self.compress(images), prompts or [""] * len(images), latent_size_of(images),
                                    generator=generators(seed, len(images)), **options)
        return self.a(images)[0].float().clamp(0, 1), from_b

    def save_stage(self, folder, stage):
        """Writes one stage's networks to <stage>.pt."""
        save_atomically(Path(folder) / f"{stage}.pt", {name: getattr(self, name).state_dict()
                                                       for name in STAGES[stage] if getattr(self, name) is not None})

    def save(self, folder, stages=tuple(STAGES)):
        """Writes what `load` reads: config.json, tokenizer/ (and tokenizer_b/ if it differs), one file per stage."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_atomically(folder / "config.json", json.dumps(asdict(self.config), indent=1) + "\n")
        self.tokenizer.save(folder / "tokenizer")
        if self.tokenizer_b is not self.tokenizer:
            self.tokenizer_b.save(folder / "tokenizer_b")
        for stage in stages:
            self.save_stage(folder, stage)

    @classmethod
    def load(cls, folder, stages=tuple(STAGES)):
        """A model from a run folder, in evaluation mode. FileNotFoundError if the folder or a stage is missing."""
        folder, stages = Path(folder), sorted(stages, key=[*STAGES].index)  # b.pt's compressor replaces text.pt's
        for path in (folder / "config.json", folder / "tokenizer", *(folder / f"{stage}.pt" for stage in stages)):
            if not path.exists():
                raise FileNotFoundError(f"no {path}: train this run first: python train.py --run {folder}")
        tokenizers = [Tokenizer.load(path) for path in (folder / "tokenizer", folder / "tokenizer_b") if path.exists()]
        model = cls(Config.from_dict(read_json(folder / "config.json")), *tokenizers)
        for stage in stages:
            weights = load_file(folder / f"{stage}.pt")
            for name in STAGES[stage]:
                if name in weights:
                    load_state(getattr(model, name), weights[name], f"{folder / stage}.pt")
                else:  # made from published weights without the compressor
                    setattr(model, name, None)
        return model.eval()

    @classmethod
    def from_official(cls, folder, device="cpu", dtype=torch.float32):
        """Loads the published model from one folder with local copies of the Hugging Face hub's snapshots
        `wuerstchen-prior` and `wuerstchen`, and also `EfficientNetEncoder` if you want to compress images. The sizes
        come from their configurations. With a dtype other than float32, use the model under torch.autocast."""
        config = official_config({name: read_json(Path(folder) / place / "config.json")
                                  for name, place in OFFICIAL_FOLDERS.items() if name != "compressor"})
        with torch.device("meta"):  # allocates no memory: the weights are assigned once they are read
            model = cls(config, *(Tokenizer.load(Path(folder) / snapshot / "tokenizer")
                                  for snapshot in ("wuerstchen-prior", "wuerstchen")))
        if not (Path(folder) / OFFICIAL_FOLDERS["compressor"]).exists():
            model.compressor = None
        for name, place in OFFICIAL_FOLDERS.items():
            if getattr(model, name) is not None:
                load_official(model, name, read_weights(Path(folder) / place))
                getattr(model, name).to(device, dtype)
        return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# 10. Version 1 of the paper: Stage B on Stage A's codes ("tokens"), with its noise, loss and sampling loop.


class SkipFirstResBlock(ResBlock):
    """The ResBlock where a skip of the U-Net enters, in the paper's first version. The skip is concatenated before the
    depthwise convolution, not after it; each of the convolution's output channels reads two adjacent channels of
    [x, skip]."""

    def __init__(self, channels, dropout):
        super().__init__(channels, dropout=dropout)
        self.depthwise = Conv(2 * channels, channels, 3, padding=1, groups=channels)

    def forward(self, x, skip, semantic=None):
        """x and skip (B, H, W, C) -> (B, H, W, C)"""
        return x + self.mlp(self.norm(self.depthwise(torch.cat([x, skip], dim=-1))))


class TokenStageB(StageB):
    """Stage B of the paper's first version. It predicts Stage A's codes ("tokens") instead of eps in latents. In its
    input, a share t of the codes has been replaced by random ones. It sees the semantic latents only through
    attention, together with the text."""

    def __init__(self, config):
        super().__init__(config)
        cfg, codebook_size = config.b, config.a.codebook_size
        self.semantic_mapper = nn.Linear(config.semantic_channels, cfg.cond_width)
        self.tokens = nn.Embedding(codebook_size, cfg.token_width)
        self.token_norm = layer_norm(cfg.token_width)
        self.embed = nn.Linear(cfg.token_width * cfg.patch**2, cfg.channels[0])
        self.out = nn.Linear(cfg.channels[0], cfg.token_width * cfg.patch**2)
        self.logit_norm = layer_norm(cfg.token_width)
        self.logits = nn.Linear(cfg.token_width, codebook_size, bias=False)
        for blocks in self.up[1:]:
            blocks[0].res = SkipFirstResBlock(blocks[0].res.depthwise.out_channels, cfg.dropout)
            blocks[0].res.apply(init_weights)
            blocks[0].res.project.weight.data *= (1 / sum(cfg.blocks)) ** 0.5

        nn.init.normal_(self.semantic_mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.embed.weight, gain=0.02)
        nn.init.zeros_(self.out.weight)  # so that all logits are equal at first
        for linear in (self.semantic_mapper, self.embed, self.out):
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.tokens.weight, std=codebook_size**-0.5)
        self.logits.weight.data = self.tokens.weight.data.clone()  # the same at first, but not tied

    def forward(self, codes, t, semantic, text):
        """codes: noisy (B, h, w), the rest as in StageB -> logits (B, h, w, codebook_size)"""
        return self.predict_logits(codes, t, self.encode_conditions(semantic, text, codes.shape[1:3]))

    def encode_conditions(self, semantic, text, size):
        """Joins the semantic latents' cells and the text into one sequence of length hs·ws + L. -> per level, the
        sequence's keys and values"""
        cells = self.semantic_mapper(semantic).flatten(1, 2)
        text = self.text_norm(torch.cat([cells, self.text_mapper(text)], dim=1))
        return [(None, blocks.keys_values(text)) for blocks in (*self.down, *self.up)]

    def predict_logits(self, codes, t, conditions):
        """codes (B, h, w), t (B,), conditions: from `encode_conditions` -> logits (B, h, w, codebook_size)"""
        h = self.out(self.unet(self.token_norm(self.tokens(codes)), t, conditions))
        return self.logits(self.logit_norm(depth_to_space(h, self.cfg.patch)))


def replace_tokens(codes, others, t, generator=None):
    """Noise for tokens: with probability t, replaces each code by the random one at the same position in `others`.
    codes and others (B, h, w), t (B,) -> noisy codes (B, h, w), and which were replaced, bool (B, h, w)"""
    replaced = random_numbers(torch.rand, codes.shape, generator, codes.device) < t.view(-1, 1, 1)
    return torch.where(replaced, others, codes), replaced


def token_loss(logits, codes, replaced, t):
    """Each image's weighted mean of the cross-entropy with label smoothing of 0.1. The weight is 1 where a token was
    replaced and 0.3 + 0.7·t elsewhere.
    logits (B, h, w, codebook_size), codes: the clean ones (B, h, w), replaced: bool (B, h, w), t (B,) -> (B,)"""
    errors = F.cross_entropy(logits.float().flatten(0, 2), codes.flatten(), label_smoothing=0.1, reduction="none")
    errors = errors.view_as(codes)
    weight = torch.where(replaced, 1.0, 0.3 + 0.7 * t.view(-1, 1, 1))
    return (weight * errors).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


@torch.no_grad()
def sample_tokens(network, start, times, conditions, guidance=1.0, generator=None, temperatures=(1.0, 0.2),
                  after_step=None):
    """The sampling loop for tokens. A step draws every code from the softmax of logits/temperature; the temperature
    falls from temperatures[0] to temperatures[1]. Then each code is reset to its starting code with probability t_next.
    network(codes, t, conditions) -> logits; start: random codes (B, h, w); after_step(codes, drawn, t_next) -> codes;
    the rest as in `sample` -> codes (B, h, w)"""
    codes = start
    for t, t_next, temperature in zip(times[:-1], times[1:], torch.linspace(*temperatures, len(times) - 1).tolist()):
        logits = guided(network, codes, t, conditions, guidance).float()
        # Gumbel-max: the index of the largest value of logits + Gumbel noise is a draw from softmax(logits).
        gumbel = -(-random_numbers(torch.rand, logits.shape, generator, codes.device).log()).log()
        drawn = (logits / temperature + gumbel).argmax(dim=-1)
        codes, _ = replace_tokens(drawn, start, t_next.expand(len(codes)), generator)
        if after_step is not None:
            codes = after_step(codes, drawn, t_next)
    return codes


# ----------------------------------------------------------------------------------------------------------------------
# 11. Files: a run's, and the published weights as stored on the hub. Nothing here computes anything.


def save_atomically(path, content):
    """Writes a string as text, or anything else with torch.save, to a temporary file, then renames the file. Even if
    the process dies, the file at `path` is complete: either the old one or the new one. Raises OSError if the file
    can't be written."""
    new = Path(f"{path}.new")
    try:
        if isinstance(content, str):
            new.write_text(content, encoding="utf-8")
        else:
            torch.save(content, new)
        os.replace(new, path)
    except RuntimeError as error:  # torch.save's
        raise OSError(f"can't write {path}: is the disk full?") from error
    finally:
        new.unlink(missing_ok=True)


def load_file(path, **options):
    """Loads what `save_atomically` wrote with torch.save, onto the CPU. UserError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"can't read {path}: it may be damaged") from error


def load_state(part, state, path):
    """Loads the state read from the file at `path` into a part of the model. Raises UserError if it does not fit."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit the sizes in config.json") from error


OFFICIAL_FOLDERS = {"text_c": "wuerstchen-prior/text_encoder", "c": "wuerstchen-prior/prior",
                    "text_b": "wuerstchen/text_encoder", "b": "wuerstchen/decoder", "a": "wuerstchen/vqgan",
                    "compressor": "EfficientNetEncoder"}

# Regular expressions and their replacements. Applied in this order, they turn our names into the hub's names.
TEXT_NAMES = {"^tokens": "embeddings.token_embedding", "^positions": "embeddings.position_embedding.weight",
              "^layers": "encoder.layers", "norm([12])": r"layer_norm\1", r"attention\.([qkv])": r"self_attn.\1_proj",
              "attention.out": "self_attn.out_proj", "expand": "mlp.fc1", "project": "mlp.fc2",
              "^norm": "final_layer_norm"}
BLOCK_NAMES = {r"res\.": "", r"time\.": "", r"attn\.": "", r"\.expand": ".channelwise.0", "grn": "channelwise.2",
               r"\.project\.": ".channelwise.4.", r"\.kv": ".kv_mapper.1", r"attention\.([qkv])": r"attention.to_\1",
               "attention.out": "attention.to_out.0"}
OFFICIAL_NAMES = {
    "text_c": TEXT_NAMES,
    "text_b": TEXT_NAMES,
    "a": {"^from_pixels": "in_block.1", "^encoder": "down_blocks", "^to_latents": "down_blocks.3.0",
          "^latent_norm": "down_blocks.3.1", "quantizer.codebook": "vquantizer.embedding.weight",
          "^from_latents": "up_blocks.0.0", r"^decoder\.(\d+)": lambda m: f"up_blocks.{int(m[1]) + 1}",
          "^to_pixels": "out_block.0", "depthwise": "depthwise.1", "expand": "channelwise.0",
          "project": "channelwise.2"},
    "compressor": {"^mapper": "mapper.0", "^norm": "mapper.1", "backbone.stages": "backbone", "layers": "block",
                   "squeeze": "fc1", "excite": "fc2"},
    "b": {"^text_mapper": "clip_mapper", "^semantic_mappers": "effnet_mappers", "^embed": "embedding.1",
          "^out": "clf.1", **BLOCK_NAMES},
    "c": {"^text_mapper": "cond_mapper", "^embed": "projection", "^out": "out.1", **BLOCK_NAMES},
}
PARTS = ("res", "time", "attn")


def official_name(part, name, config):
    """The hub's name for a tensor of one of our networks. Their networks number the ResBlocks, TimestepBlocks,
    AttnBlocks and resampling layers of a level in one list."""
    heads = config.b.heads

    def in_level(m):
        level = int(m[2]) if m[1] == "down" else len(heads) - 1 - int(m[2])
        index = int(m[3]) * (3 if heads[level] else 2) + PARTS.index(m[4]) + (m[1] == "down" and level > 0)
        return f"{m[1]}_blocks.{m[2]}.{index}."

    def upscale(m):
        level = len(heads) - 1 - int(m[1])
        return f"up_blocks.{m[1]}.{config.b.blocks[level] * (3 if heads[level] else 2)}"

    if part == "b":
        name = re.sub(r"^(down|up)\.(\d+)\.(\d+)\.(res|time|attn)\.", in_level, name)
        name = re.sub(r"^downscale\.(\d+)", lambda m: f"down_blocks.{int(m[1]) + 1}.0", name)
        name = re.sub(r"^upscale\.(\d+)", upscale, name)
    if part == "c":
        name = re.sub(r"^blocks\.(\d+)\.(res|time|attn)\.",
                      lambda m: f"blocks.{3 * int(m[1]) + PARTS.index(m[2])}.", name)
    for ours, theirs in OFFICIAL_NAMES[part].items():
        name = re.sub(ours, theirs, name)
    return name


def official_config(c):
    """Converts the sizes in the snapshots' config.json files to ours. c: {name: the file as a dictionary} for
    "text_c", "text_b", "a", "b" and "c" -> Config"""
    text_c, text_b = (TextConfig(vocab_size=d["vocab_size"], length=d["max_position_embeddings"],
                                 width=d["hidden_size"], depth=d["num_hidden_layers"], heads=d["num_attention_heads"],
                                 mlp_width=d["intermediate_size"]) for d in (c["text_c"], c["text_b"]))
    a, b, c = c["a"], c["b"], c["c"]
    return Config(
        semantic_channels=c["c_in"], latent_channels=b["c_in"], time_width=b["c_r"], text_c=text_c, text_b=text_b,
        a=VQGANConfig(channels=(a["embed_dim"] // 2, a["embed_dim"]), blocks=a["bottleneck_blocks"],
                      codebook_size=a["num_vq_embeddings"], scale=a["scale_factor"]),
        b=StageBConfig(channels=b["c_hidden"], blocks=b["blocks"], heads=[max(0, heads) for heads in b["nhead"]],
                       sees_semantic=b["inject_effnet"], cond_width=b["c_cond"], patch=b["patch_size"],
                       dropout=b["dropout"]),
        c=StageCConfig(width=c["c"], depth=c["depth"], heads=c["nhead"], dropout=c["dropout"]))


def load_official(model, part, weights):
    """Loads the hub's weights {official name: tensor} into one network of a model. If tensors are missing, unexpected
    or of the wrong shape, PyTorch raises a RuntimeError that names them."""
    network, config = getattr(model, part), model.config
    ours, found = network.state_dict(), {}
    weights = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()  # a prefix of older files
               if not key.endswith("position_ids")}
    if part == "a":  # the weight files lack these values: this one is in config.json, Stage C's are in the pipeline
        found["scale"] = torch.tensor(config.a.scale)
    elif part == "c":  # Stage C diffuses (e + 1) / 42, e being the compressor's output
        found["latent_mean"] = torch.full((config.semantic_channels,), -1.0)
        found["latent_std"] = torch.full((config.semantic_channels,), 42.0)
    for key in ours:
        if (theirs := official_name(part, key, config)) in weights:
            tensor = weights.pop(theirs)
            fits = tensor.squeeze().shape == ours[key].squeeze().shape  # a 1x1 convolution is a Linear here
            found[key] = tensor.reshape(ours[key].shape) if fits else tensor
    network.load_state_dict(found | weights, assign=True)


def read_weights(folder):
    """All tensors of a component: its *.safetensors or, where there is none, its *.bin -> {name: tensor}"""
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    paths = [path for path in paths if ".fp16." not in path.name] or paths
    if not paths:
        raise FileNotFoundError(f"no weights (*.safetensors, *.bin) in {folder}")
    weights = {}
    for path in paths:  # large components come in parts
        weights |= (read_safetensors(path) if path.suffix == ".safetensors" else
                    load_file(path, mmap=True))
    return weights


SAFETENSORS_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path):
    """A safetensors file: 8 bytes of header length, a JSON header, then the tensors' bytes, memory-mapped. UserError
    for anything else. -> {name: tensor}"""
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        return {name: torch.frombuffer(data, dtype=SAFETENSORS_TYPES[entry["dtype"]], count=math.prod(entry["shape"]),
                                       offset=start + entry["data_offsets"][0]).view(entry["shape"])
                for name, entry in header.items()}
    except (ValueError, KeyError) as error:
        raise UserError(f"can't read {path}: it may be damaged") from error
