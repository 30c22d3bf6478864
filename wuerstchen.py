"""
Würstchen: text-to-image diffusion in a space 42 times smaller than the picture, in one readable module.

Pernias, Rampas, Richter, Pal, Aubreville: "Würstchen: An Efficient Architecture for Large-Scale Text-to-Image
Diffusion Models", arXiv 2306.00637 ("the paper" below). Three stages, trained A -> B -> C and run C -> B -> A:

    caption --TextEncoder--> text --StageC--> semantic latents --StageB--> latents --VQGAN decoder--> picture
                                   (B, 24, 24, 16)          (B, 256, 256, 4)              (B, 1024, 1024, 3)

Read it from top to bottom:

    1. sizes        Config and PRESETS
    2. blocks       ResBlock, TimestepBlock, AttnBlock: what stages B and C are made of
    3. text         TextEncoder, CLIP
    4. Stage A      VQGAN, Discriminator
    5. compressor   EfficientNet, SemanticCompressor
    6. Stage B      a U-Net in Stage A's latent space
    7. Stage C      a flat network on the semantic latents
    8. diffusion    schedule, noise, steps, the sampling loop
    9. Wuerstchen   all of it together: generate, reconstruct, save, load
   10. hub          the published weights; a reader of the model can skip it

What is notable:
- Pictures and activations are channels last, (B, H, W, C), everywhere. LayerNorm, Linear and GlobalResponseNorm then
  need no permutes, and a 1x1 convolution simply is a Linear. The few real convolutions see the same memory as an
  NCHW tensor in PyTorch's `channels_last` format, which is the fast one for them anyhow.
- Pictures are float in [0, 1]. "Latents" are Stage A's, "semantic" the semantic compressor's.
- Time is continuous, t in [0, 1]: 0 is the clean picture, 1 is noise.
"""

import json
import math
import mmap
import os
import pickle
import re
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from tokenizer import Tokenizer, read_json

# ----------------------------------------------------------------------------------------------------------------------
# 1. Sizes. One small dataclass a network; the defaults are the published 1024-px model ("v2").


@dataclass
class TextConfig:
    """A CLIP text transformer. The defaults are ViT-H/14's, which conditions Stage B."""
    vocab_size: int = 49408
    length: int = 77  # tokens in a caption, padded
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 4096
    activation: str = "gelu"  # or "quick_gelu", OpenAI's approximation


@dataclass
class VQGANConfig:
    channels: tuple = (192, 384)  # of each level
    blocks: int = 12  # in the decoder, at the lowest resolution
    latent_channels: int = 4
    codebook_size: int = 8192
    scale: float = 0.3764  # B works on latents divided by this
    disc_depth: int = 6
    disc_width: int = 512


@dataclass
class CompressorConfig:
    """EfficientNetV2-S. A stage: (block, expansion, stride, channels, layers)."""
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
    channels: int = 16  # of the semantic latents


@dataclass
class StageBConfig:
    channels: tuple = (320, 640, 1280, 1280)  # of each level
    blocks: tuple = (4, 4, 14, 4)  # on the way down, and mirrored on the way up
    heads: tuple = (0, 10, 20, 20)  # 0: a level without attention
    semantic: tuple = (False, True, True, True)  # levels whose ResBlocks see the semantic latents
    cond_width: int = 1024
    text_width: int = 1024
    patch: int = 2
    dropout: float = 0.1
    latent_channels: int = 4
    semantic_channels: int = 16
    time_width: int = 64


@dataclass
class StageCConfig:
    width: int = 1536
    depth: int = 32
    heads: int = 24
    text_width: int = 1280
    dropout: float = 0.1
    channels: int = 16
    time_width: int = 64


@dataclass
class Config:
    """Sizes of the whole system: `text` for Stage C, `text_b` for Stage B."""
    image_size: int = 1024  # side in pixels that the stages are trained at
    text: TextConfig = field(default_factory=TextConfig)
    text_b: TextConfig = field(default_factory=TextConfig)
    a: VQGANConfig = field(default_factory=VQGANConfig)
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    b: StageBConfig = field(default_factory=StageBConfig)
    c: StageCConfig = field(default_factory=StageCConfig)

    @property
    def stride(self):
        """Pixels that a side of a picture must divide by: Stage A's 4, B's patch and B's down-samplings."""
        return 4 * self.b.patch * 2 ** (len(self.b.channels) - 1)

    @property
    def cells(self):
        """Side of the semantic latents at `image_size`: shrunk to 3/4, then EfficientNet's stride of 32. 128 -> 3"""
        return math.ceil(0.75 * self.image_size / 32)

    def grid(self, height, width):
        """Sizes to draw a picture of height x width pixels at, rounded as the published model does: one semantic cell
        for each 42.67 pixels or part of them, 10.67 latents a cell, and those to what Stage B's strides divide.
        -> semantic (hs, ws), Stage A's latents (h, w)"""
        side, unit = self.image_size, self.stride // 4
        semantic = [max(1, math.ceil(pixels * self.cells / side)) for pixels in (height, width)]
        latents = [int(n * side / 4 / self.cells) for n in semantic]
        return tuple(semantic), tuple(max(1, round(n / unit)) * unit for n in latents)

    @classmethod
    def from_dict(cls, d):
        parts = dict(text=TextConfig, text_b=TextConfig, a=VQGANConfig, compressor=CompressorConfig,
                     b=StageBConfig, c=StageCConfig)
        return cls(**{k: parts[k](**v) if k in parts else v for k, v in d.items()})


PRESETS = {
    # Trains on two CPU cores in minutes.
    "tiny": Config(
        image_size=128,
        text=TextConfig(vocab_size=1024, length=24, width=128, depth=3, heads=4, mlp_width=512),
        text_b=TextConfig(vocab_size=1024, length=24, width=128, depth=3, heads=4, mlp_width=512),
        a=VQGANConfig(channels=(32, 64), blocks=2, codebook_size=256, disc_depth=4, disc_width=128),
        compressor=CompressorConfig(stem=16, stages=(("fused", 1, 1, 16, 1), ("fused", 4, 2, 24, 1),
                                                     ("fused", 4, 2, 32, 1), ("mbconv", 4, 2, 64, 2),
                                                     ("mbconv", 4, 1, 80, 1), ("mbconv", 4, 2, 128, 1)),
                                    features=256, stochastic_depth=0.0),
        b=StageBConfig(channels=(64, 128, 128), blocks=(1, 2, 2), heads=(0, 4, 4), semantic=(True, True, True),
                       cond_width=128, text_width=128, dropout=0.0),
        c=StageCConfig(width=192, depth=6, heads=6, text_width=128, dropout=0.0),
    ),
    # One consumer GPU, 32 to 256 px: CIFAR, COCO subsets.
    "small": Config(
        image_size=256,
        text=TextConfig(vocab_size=8192, length=77, width=512, depth=8, heads=8, mlp_width=2048),
        text_b=TextConfig(vocab_size=8192, length=77, width=512, depth=8, heads=8, mlp_width=2048),
        a=VQGANConfig(channels=(96, 192), blocks=6, codebook_size=4096, disc_depth=5, disc_width=256),
        compressor=CompressorConfig(),
        b=StageBConfig(channels=(128, 256, 512), blocks=(2, 4, 6), heads=(0, 8, 16), semantic=(False, True, True),
                       cond_width=256, text_width=512),
        c=StageCConfig(width=768, depth=16, heads=12, text_width=512),
    ),
    # The published model.
    "v2": Config(
        text=TextConfig(width=1280, depth=32, heads=20, mlp_width=5120),  # ViT-bigG/14; B's is the default, ViT-H/14
    ),
}


# ----------------------------------------------------------------------------------------------------------------------
# 2. Blocks shared by stages B and C (paper, section 3 and appendix; ConvNeXt-like).


class Conv(nn.Conv2d):
    """A convolution on (B, H, W, C). The permutes only rename axes, no memory moves."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvUp(nn.ConvTranspose2d):
    """A transposed convolution on (B, H, W, C)."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def layer_norm(channels):
    """LayerNorm over channels without weights: the time embedding does the scaling."""
    return nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)


def space_to_depth(x, patch):
    """(B, H, W, C) -> (B, H/patch, W/patch, C·patch²), channels in nn.PixelUnshuffle's order."""
    B, H, W, C = x.shape
    x = x.view(B, H // patch, patch, W // patch, patch, C)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(B, H // patch, W // patch, C * patch * patch)


def depth_to_space(x, patch):
    """(B, h, w, C·patch²) -> (B, h·patch, w·patch, C): the inverse of space_to_depth."""
    B, H, W, C = x.shape
    x = x.view(B, H, W, C // patch**2, patch, patch)
    return x.permute(0, 1, 4, 2, 5, 3).reshape(B, H * patch, W * patch, C // patch**2)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's GRN: channels that respond more than the average over the picture are strengthened."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)"""
        # The L2 norm by hand: on a CPU much faster than torch.linalg's. Squares stay in bfloat16 and are summed in
        # float32, which spares a copy of the largest activations there are; float16's range is too small for that.
        # The 1e-12 keeps the gradient of the root finite where a channel is silent.
        wide = x.float() if x.dtype == torch.float16 else x
        energy = ((wide * wide).sum(dim=(1, 2), keepdim=True).float() + 1e-12).sqrt()
        energy = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta.to(x.dtype), x, (1 + self.gamma * energy).to(x.dtype))


class Dropout(nn.Dropout):
    """The same with cheaper random numbers on a CPU: nn.Dropout draws 64 bits for every element, one after another, and
    that took longer than the matrix products around it. Here an element gets 8 of them, so `p` counts in 256ths."""

    def forward(self, x):
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(x)
        drop = round(256 * self.p)
        bits = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
        keep = bits[:x.numel()].view(x.shape).to(x.dtype).ge_(drop)
        return x * keep.mul_(256 / (256 - drop))


class ResBlock(nn.Module):
    """Depthwise 3x3 mixes space, then an MLP mixes channels. `more_channels` may join before the MLP: the U-Net's skip
    and, through a mapper, the semantic latents (Stage B)."""

    def __init__(self, channels, more_channels=0, dropout=0.0):
        super().__init__()
        self.depthwise = Conv(channels, channels, 3, padding=1, groups=channels)
        self.norm = layer_norm(channels)
        self.expand = nn.Linear(channels + more_channels, 4 * channels)
        self.grn = GlobalResponseNorm(4 * channels)
        self.dropout = Dropout(dropout)
        self.project = nn.Linear(4 * channels, channels)

    def read(self, semantic, mapper):
        """Two Linears in a row are one: the mapper, and what `expand` does to its channels, which come last. So
        `expand` has 16 more channels to multiply instead of hundreds.
        semantic (B, H, W, 16), mapper: Linear -> what F.linear takes: semantic, weight (4C, 16), bias (4C,)"""
        weight = self.expand.weight[:, -mapper.out_features:]
        return semantic, weight @ mapper.weight, weight @ mapper.bias

    def forward(self, x, skip=None, read=None):
        """x (B, H, W, C), skip (B, H, W, ...), read: what `read` gave -> (B, H, W, C)"""
        h = self.norm(self.depthwise(x))
        if skip is not None:
            h = torch.cat([h, skip], dim=-1)
        if read is None:
            h = self.expand(h)
        else:
            h = F.linear(h, self.expand.weight[:, :h.shape[-1]], self.expand.bias) + F.linear(*read)
        h = self.grn(F.gelu(h))
        return x + self.project(self.dropout(h))


class TimestepBlock(nn.Module):
    """Scales and shifts every channel by the time: x·(1 + a) + b."""

    def __init__(self, channels, time_width):
        super().__init__()
        self.mapper = nn.Linear(time_width, 2 * channels)

    def forward(self, x, time):
        """x (B, H, W, C), time (B, time_width) -> (B, H, W, C)"""
        a, b = self.mapper(time)[:, None, None].to(x.dtype).chunk(2, dim=-1)
        return torch.addcmul(b, x, 1 + a)


def attention(q, k, v, mask=None):
    """softmax(q·kᵀ/√d)·v. q (B, heads, N, d), k, v (B, heads, M, d), mask: bool, broadcast to (B, heads, N, M),
    True where a query may look -> (B, heads, N, d)"""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # The same by hand: on a CPU, the fused kernel's backward pass is ten times as slow for such short sequences.
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head attention of x to context."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context, mask=None):
        """x (B, N, C), context (B, M, C), mask: bool, broadcast to (B, heads, N, M) -> (B, N, C)"""
        return self.look_up(self.q(x), self.k(context), self.v(context), mask)

    def look_up(self, q, k, v, mask=None):
        """The same from queries (B, N, C), keys and values (B, M, C)"""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.out(attention(q, k, v, mask).transpose(1, 2).flatten(2))


class AttnBlock(nn.Module):
    """Self and cross attention in one: every position attends to all positions and to the text. What there is to see of
    the text depends on neither picture nor time: `read` is called once a picture, `forward` at every step."""

    def __init__(self, channels, cond_width, heads):
        super().__init__()
        self.norm = layer_norm(channels)
        self.kv = nn.Linear(cond_width, channels)
        self.attention = Attention(channels, heads)

    def read(self, text):
        """text (B, L, cond_width), after SiLU -> its keys and values (B, L, C)"""
        # Again two Linears in a row: `kv` and the one after it.
        return [F.linear(text, after.weight @ self.kv.weight, after.weight @ self.kv.bias + after.bias)
                for after in (self.attention.k, self.attention.v)]

    def forward(self, x, text):
        """x (B, H, W, C), text: keys and values -> (B, H, W, C)"""
        pixels = self.norm(x).flatten(1, 2)
        k = torch.cat([self.attention.k(pixels), text[0]], dim=1)
        v = torch.cat([self.attention.v(pixels), text[1]], dim=1)
        return x + self.attention.look_up(self.attention.q(pixels), k, v).view_as(x)


def time_embedding(t, width):
    """Sines and cosines of the time. t (B,) in [0, 1] -> (B, width)"""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
    angles = t[:, None] * 10000 * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def init_weights(module):
    """Xavier-uniform for every Linear and convolution, zero biases (authors' code)."""
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
        self.quick_gelu = cfg.activation == "quick_gelu"
        self.norm1 = nn.LayerNorm(cfg.width)
        self.attention = Attention(cfg.width, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.width)
        self.expand = nn.Linear(cfg.width, cfg.mlp_width)
        self.project = nn.Linear(cfg.mlp_width, cfg.width)

    def forward(self, x, mask):
        """x (B, L, width), mask (B, 1, L, L): True where a token may look -> (B, L, width)"""
        h = self.norm1(x)
        x = x + self.attention(h, h, mask)
        h = self.expand(self.norm2(x))
        h = h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h)
        return x + self.project(h)


class TextEncoder(nn.Module):
    """Token ids to one vector a token: CLIP's `last_hidden_state`, which stages B and C attend to, padding and all."""

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
        """ids (B, L), mask (B, L): True for the caption's own tokens, False for padding -> (B, L, width)"""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        # A token sees those before it and no padding. Padded places see the whole caption.
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        visible = causal & mask[:, None, None]
        for layer in self.layers:
            x = layer(x, visible)
        return self.norm(x)


class CLIP(nn.Module):
    """A text encoder and an EfficientNet that learn to agree on which caption belongs to which picture. The text
    encoder is what the stages need of it; Stage B's compressor starts from the picture side (as the authors' starts
    from ImageNet weights)."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg.text_b.width
        self.text = TextEncoder(cfg.text_b)
        self.image = EfficientNet(cfg.compressor)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.image_projection = nn.Linear(9 * cfg.compressor.features, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_text(self, ids, mask):
        """ids and mask (N, L) -> unit vectors (N, width)"""
        end = mask.sum(dim=1) - 1  # the end token has read the whole caption
        text = self.text(ids, mask)[torch.arange(len(ids), device=ids.device), end]
        return F.normalize(self.text_projection(text).float(), dim=-1)

    def image_features(self, images):
        """images (B, H, W, 3) in [0, 1] -> features of 3x3 parts of the picture (B, 9, compressor.features)"""
        # Shrunk as the compressor has them: learned at another size, a shape is strange to it. In parts, not averaged
        # over the picture: it then need not tell each cell what lies in all others, and keeps more of the shapes.
        return F.adaptive_avg_pool2d(self.image(shrink(images)).permute(0, 3, 1, 2), 3).flatten(2).mT

    def embed_images(self, images):
        """images (B, H, W, 3) in [0, 1] -> unit vectors (B, width)"""
        return F.normalize(self.image_projection(self.image_features(images).flatten(1)).float(), dim=-1)

    def compare(self, image, text):
        """Unit vectors (B, width), (N, width) -> logits (B, N): row i, how well picture i fits each caption"""
        return self.logit_scale.exp().clamp(max=100) * image @ text.T

    def forward(self, images, ids, mask):
        """images (B, H, W, 3) in [0, 1], ids and mask (N, L) -> logits (B, N)"""
        return self.compare(self.embed_images(images), self.embed_text(ids, mask))


def contrastive_loss(logits, ids):
    """CLIP's symmetric cross-entropy, where captions that are equal within the batch all count as right.
    logits (B, N), ids (N, L): the first B captions are the pictures', any others fit none of them -> scalar"""
    same = (ids[: len(logits), None] == ids[None]).all(dim=-1).float()
    of_picture = same / same.sum(dim=1, keepdim=True)
    own = same[:, : len(logits)]
    of_caption = own / own.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, of_picture) + F.cross_entropy(logits[:, : len(logits)].T, of_caption)) / 2


# ----------------------------------------------------------------------------------------------------------------------
# 4. Stage A: a VQGAN that makes pictures 4 times smaller in each direction (paper, section 3.1; Esser et al., 2021).


def pad_edges(x):
    """Repeats the outermost pixels once. (B, H, W, C) -> (B, H + 2, W + 2, C)"""
    with torch.autocast(x.device.type, enabled=False):  # which would go to float32 and back for it
        return F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate").permute(0, 2, 3, 1)


class VQBlock(nn.Module):
    """Depthwise convolution and MLP, each behind a LayerNorm and scaled by learned scalars that start at 0."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = Conv(channels, channels, 3, groups=channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)"""
        g = self.gammas
        x = x + self.depthwise(pad_edges(self.modulated_norm(x, g[0], g[1]))) * g[2]
        h = F.gelu(self.expand(self.modulated_norm(x, g[3], g[4])))
        return x + self.project(h) * g[5]

    def modulated_norm(self, x, scale, shift):
        """LayerNorm(x)·(1 + scale) + shift, as one operation"""
        C = x.shape[-1:]
        return F.layer_norm(x, C, (1 + scale).expand(C), shift.expand(C), eps=1e-6)


class Quantizer(nn.Module):
    """Each latent vector becomes its nearest codebook entry; gradients pass straight through."""

    def __init__(self, codebook_size, channels):
        super().__init__()
        start = 1 / codebook_size
        self.codebook = nn.Parameter(torch.empty(codebook_size, channels).uniform_(-start, start))

    def forward(self, x):
        """x (B, h, w, C) -> quantized (B, h, w, C), codes (B, h, w) int64, loss: scalar, codebook + 0.25·commitment"""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # nearness needs float32
            flat, codebook = x.detach().float().reshape(-1, x.shape[-1]), self.codebook.float()
            length = codebook.square().sum(dim=1)
            # |x - c|² less |x|², which is the same for all codes; a few at a time, so that they stay in the cache
            codes = torch.cat([torch.addmm(length, some, codebook.T, alpha=-2).argmin(dim=1)
                               for some in flat.split(1024 if x.device.type == "cpu" else 2**16)]).view(x.shape[:-1])
        quantized = F.embedding(codes, self.codebook)
        loss = F.mse_loss(quantized, x.detach()) + 0.25 * F.mse_loss(x, quantized.detach())
        return x + (quantized - x).detach(), codes, loss

    @torch.no_grad()
    def revive(self, x, codes, idle, patience):
        """Moves every code that nothing has chosen for `patience` steps onto a random latent of this batch, so that
        the codebook can't collapse. x (B, h, w, C), codes (B, h, w); idle (codebook_size,): steps since each code was
        last chosen, kept up here; begun with inf, the first batch places all codes among its latents -> how many were
        moved"""
        idle += 1
        idle[codes.unique()] = 0
        dead = (idle >= patience).nonzero()[:, 0]
        flat = x.detach().float().reshape(-1, x.shape[-1])
        if not flat.isfinite().all():  # the step will be skipped
            return 0
        self.codebook[dead] = flat[torch.randint(len(flat), (len(dead),), device=x.device)]
        idle[dead] = 0
        return len(dead)


def codebook_usage(codes, codebook_size):
    """Share of the codebook in use, and its perplexity (1: one code for everything; codebook_size: all equally often).
    codes: any shape of int64 -> (float in [0, 1], float >= 1)"""
    share = torch.bincount(codes.flatten(), minlength=codebook_size) / codes.numel()
    perplexity = torch.special.entr(share).sum().exp()
    return (share > 0).float().mean().item(), perplexity.item()


class VQGAN(nn.Module):
    """Pictures to latents and back. Since v2, Stage B works on the latents *before* quantization."""

    def __init__(self, cfg):
        super().__init__()
        c = cfg.channels
        self.register_buffer("scale", torch.tensor(cfg.scale))
        self.from_pixels = nn.Linear(3 * 4, c[0])
        encoder = []
        for i, channels in enumerate(c):
            if i > 0:
                encoder.append(Conv(c[i - 1], channels, 4, stride=2, padding=1))
            encoder.append(VQBlock(channels))
        self.encoder = nn.Sequential(*encoder)
        self.to_latents = nn.Linear(c[-1], cfg.latent_channels, bias=False)
        self.latent_norm = nn.BatchNorm1d(cfg.latent_channels)  # so that latents have mean 0 and deviation 1
        self.quantizer = Quantizer(cfg.codebook_size, cfg.latent_channels)
        self.from_latents = nn.Linear(cfg.latent_channels, c[-1])
        decoder = []
        for i, channels in reversed(list(enumerate(c))):
            decoder += [VQBlock(channels) for _ in range(cfg.blocks if i == len(c) - 1 else 1)]
            if i > 0:
                decoder.append(ConvUp(channels, c[i - 1], 4, stride=2, padding=1))
        self.decoder = nn.Sequential(*decoder)
        self.to_pixels = nn.Linear(c[0], 3 * 4)

    def encode(self, images):
        """images (B, H, W, 3) in [0, 1] -> latents before quantization (B, H/4, W/4, 4)"""
        x = self.to_latents(self.encoder(self.from_pixels(space_to_depth(images, 2))))
        return self.latent_norm(x.flatten(0, 2)).view_as(x)

    def decode(self, latents):
        """latents (B, h, w, 4), quantized or not -> images (B, 4h, 4w, 3), not clamped"""
        return depth_to_space(self.to_pixels(self.decoder(self.from_latents(latents))), 2)

    def forward(self, images):
        """images (B, H, W, 3) in [0, 1] -> reconstruction (B, H, W, 3), latents (B, H/4, W/4, 4),
        codes (B, H/4, W/4), quantizer's loss"""
        latents = self.encode(images)
        quantized, codes, loss = self.quantizer(latents)
        return self.decode(quantized), latents, codes, loss


class Discriminator(nn.Module):
    """Says for each patch of a picture how real it looks (as in the authors' Paella)."""

    def __init__(self, depth, width):
        super().__init__()
        layers, channels = [], 3
        for i in range(depth):
            out = width // 2 ** max(depth - 3 - i, 0)
            layers.append(spectral_norm(nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=i == 0)))
            if i > 0:
                layers.append(nn.InstanceNorm2d(out))  # takes the mean away, and with it any bias before it
            layers.append(nn.LeakyReLU(0.2))
            channels = out
        self.net = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, images):
        """images (B, H, W, 3) in [0, 1] -> logits (B, 1, h, w), each side halved `depth` times; positive: real"""
        return self.net(images.permute(0, 3, 1, 2) * 2 - 1)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Semantic Compressor: EfficientNetV2 (Tan and Le, 2021) and a mapper to 16 channels (paper, section 3.1).
# Its blocks are ordinary NCHW layers: BatchNorm2d wants channels second. Ends are (B, H, W, C) like everything else.


class StridedDepthwise(nn.Conv2d):
    """In float32 on a CPU: there the bfloat16 backward pass takes ten to twenty times as long."""

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x.float(), self.weight.float(), None, self.stride, self.padding, groups=self.groups)


def conv_norm(c_in, c_out, kernel, stride=1, groups=1, activation=True):
    kind = StridedDepthwise if groups > 1 and stride > 1 else nn.Conv2d
    conv = kind(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(c_out, eps=1e-3)
    return nn.Sequential(conv, norm, nn.SiLU()) if activation else nn.Sequential(conv, norm)


class SqueezeExcitation(nn.Module):
    """Weighs channels by what the whole picture holds."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.squeeze = nn.Linear(channels, squeezed)
        self.excite = nn.Linear(squeezed, channels)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)"""
        weight = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean(dim=(2, 3))))))
        return x * weight[:, :, None, None]


class MBConv(nn.Module):
    """Expand, depthwise 3x3, squeeze-excitation, project; `fused`: one full 3x3 convolution expands, and no
    squeeze-excitation. A block is left out at random with probability `drop` in training (stochastic depth)."""

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
            h = h * keep / (1 - self.drop)
        return x + h


class EfficientNet(nn.Module):
    """EfficientNetV2's features: stride 32."""

    def __init__(self, cfg):
        super().__init__()
        stages = [conv_norm(3, cfg.stem, 3, 2)]
        channels, total, done = cfg.stem, sum(stage[-1] for stage in cfg.stages), 0
        for kind, expansion, stride, out, count in cfg.stages:
            blocks = []
            for i in range(count):
                drop = cfg.stochastic_depth * done / total
                blocks.append(MBConv(channels, out, expansion, stride if i == 0 else 1, kind == "fused", drop))
                channels, done = out, done + 1
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages, conv_norm(channels, cfg.features, 1))

    def forward(self, images):
        """images (B, H, W, 3) in [0, 1] -> features (B, ⌈H/32⌉, ⌈W/32⌉, features)"""
        mean, std = images.new_tensor([0.485, 0.456, 0.406]), images.new_tensor([0.229, 0.224, 0.225])  # ImageNet's
        return self.stages(((images - mean) / std).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SemanticCompressor(nn.Module):
    """A picture, shrunk to 3/4, to a few semantic latents: 128 px -> 96 px -> 3x3x16."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = EfficientNet(cfg)
        self.mapper = nn.Linear(cfg.features, cfg.channels, bias=False)
        self.norm = nn.BatchNorm1d(cfg.channels)

    def forward(self, images):
        """images (B, H, W, 3) in [0, 1], already resized -> semantic latents (B, ⌈H/32⌉, ⌈W/32⌉, 16)"""
        x = self.mapper(self.backbone(images))
        return self.norm(x.flatten(0, 2)).view_as(x)


def resize(images, height, width, align_corners=False):
    """Bicubic with anti-aliasing. (B, H, W, C) -> (B, height, width, C)"""
    x = F.interpolate(images.permute(0, 3, 1, 2).float(), (height, width), mode="bicubic", antialias=True,
                      align_corners=align_corners)
    return x.permute(0, 2, 3, 1)


def shrink(images):
    """What the compressor is fed: the picture at 3/4 of its size. (B, H, W, 3) -> (B, 3H/4, 3W/4, 3)"""
    return resize(images, round(0.75 * images.shape[1]), round(0.75 * images.shape[2]))


# ----------------------------------------------------------------------------------------------------------------------
# 6. Stage B: from semantic latents (and text) to Stage A's latents, by a diffusion U-Net (paper, section 3.2).


class Level(nn.Module):
    """One resolution of the U-Net, on the way down or up: `blocks` times ResBlock, TimestepBlock and, where the level
    has heads, AttnBlock. `before` and `after` change the resolution."""

    def __init__(self, cfg, i, skip_channels=0, before=None, after=None):
        super().__init__()
        c = cfg.channels[i]
        self.mapper = nn.Linear(cfg.semantic_channels, cfg.cond_width) if cfg.semantic[i] else None
        cond = cfg.cond_width if cfg.semantic[i] else 0
        self.blocks = nn.ModuleList([before] if before else [])
        for j in range(cfg.blocks[i]):
            self.blocks.append(ResBlock(c, cond + (skip_channels if j == 0 else 0), cfg.dropout))
            self.blocks.append(TimestepBlock(c, cfg.time_width))
            if cfg.heads[i]:
                self.blocks.append(AttnBlock(c, cfg.cond_width, cfg.heads[i]))
        if after:
            self.blocks.append(after)

    def read(self, semantic, text):
        """What doesn't change from step to step. semantic (B, H, W, 16), of this level's size; text (B, L, cond_width)
        -> for each block what it sees of them, None if nothing"""
        reads = []
        for block in self.blocks:
            if isinstance(block, ResBlock) and self.mapper is not None:
                reads.append(block.read(semantic, self.mapper))
            else:
                reads.append(block.read(text) if isinstance(block, AttnBlock) else None)
        return reads

    def forward(self, x, time, reads, skip=None):
        """x (B, H, W, C), time (B, time_width), reads: what `read` gave, skip (B, H, W, skip_channels): the same
        level's output on the way down -> (B, H, W, C); where `before` or `after` is given, x has another size on that
        side"""
        for block, read in zip(self.blocks, reads):
            if isinstance(block, ResBlock):
                x = block(x, skip, read)
                skip = None  # only the first ResBlock sees it
            elif isinstance(block, TimestepBlock):
                x = block(x, time)
            elif isinstance(block, AttnBlock):
                x = block(x, read)
            else:
                x = block(x)
        return x


class StageB(nn.Module):
    """The noise in Stage A's latents, given the semantic latents and the text ("DiffNeXt")."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        c, depth = cfg.channels, len(cfg.channels)
        self.text_mapper = nn.Linear(cfg.text_width, cfg.cond_width)
        self.text_norm = layer_norm(cfg.cond_width)
        self.embed = nn.Linear(cfg.latent_channels * cfg.patch**2, c[0])
        self.embed_norm = layer_norm(c[0])
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i in range(depth):
            before = nn.Sequential(layer_norm(c[i - 1]), Conv(c[i - 1], c[i], 2, stride=2)) if i > 0 else None
            self.down.append(Level(cfg, i, before=before))
        for i in reversed(range(depth)):
            after = nn.Sequential(layer_norm(c[i]), ConvUp(c[i], c[i - 1], 2, stride=2)) if i > 0 else None
            self.up.append(Level(cfg, i, c[i] if i < depth - 1 else 0, after=after))
        self.out_norm = layer_norm(c[0])
        self.out = nn.Linear(c[0], 2 * cfg.latent_channels * cfg.patch**2)

        self.apply(init_weights)
        nn.init.normal_(self.text_mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.embed.weight, gain=0.02)
        nn.init.zeros_(self.out.weight)
        for level in (*self.down, *self.up):
            if level.mapper is not None:
                # The authors' N(0, 0.02) meets semantic latents of deviation 42 (Stage C diffuses (e + 1) / 42). Fresh
                # ones have deviation 1, and would be too quiet to be noticed for thousands of steps.
                nn.init.normal_(level.mapper.weight, std=0.02 * 42)
            for block in level.blocks:
                if isinstance(block, ResBlock):
                    block.project.weight.data *= (1 / sum(cfg.blocks)) ** 0.5
                elif isinstance(block, TimestepBlock):
                    nn.init.zeros_(block.mapper.weight)

    def forward(self, x, t, semantic, text):
        """x: noisy latents (B, h, w, 4), t (B,) in [0, 1], semantic (B, hs, ws, 16), text (B, L, text_width)
        -> predicted noise (B, h, w, 4). h and w divide by patch·2^(levels-1)."""
        return self.denoise(x, t, self.read(semantic, text, x.shape[1:3]))

    def read(self, semantic, text, size):
        """What all steps of a picture share, whatever the noise and the time. semantic (B, hs, ws, 16), text
        (B, L, text_width), size (h, w) of the latents -> a list for `denoise`, what each level sees of them"""
        text = F.silu(self.text_norm(self.text_mapper(text)))
        # align_corners: the corner cells of the small grid sit on the corner cells of the large one.
        sizes = [[n // self.cfg.patch // 2**i for n in size] for i in range(len(self.down))]
        grids = [resize(semantic, *hw, align_corners=True) if used else None
                 for hw, used in zip(sizes, self.cfg.semantic)]
        levels, grids = [*self.down, *self.up], grids + grids[::-1]
        return [level.read(grid, text) for level, grid in zip(levels, grids)]

    def denoise(self, x, t, read):
        """x (B, h, w, 4), t (B,), read: what `read` gave -> predicted noise (B, h, w, 4)"""
        time = time_embedding(t, self.cfg.time_width)
        h = self.embed_norm(self.embed(space_to_depth(x, self.cfg.patch)))

        skips, read = [], iter(read)
        for level in self.down:
            h = level(h, time, next(read))
            skips.append(h)
        skips.pop()  # the lowest level's output is h itself
        for i, level in enumerate(self.up):
            h = level(h, time, next(read), skips.pop() if i > 0 else None)

        # The network says x = a + b·noise, which is easy at both ends of time: near 0 take all from a, near 1 from x.
        a, b = depth_to_space(self.out(self.out_norm(h)), self.cfg.patch).chunk(2, dim=-1)
        b = b.float().sigmoid() * (1 - 2e-3) + 1e-3
        return (x - a) / b


# ----------------------------------------------------------------------------------------------------------------------
# 7. Stage C: from text to semantic latents (paper, section 3.3). So small a grid needs no U-Net.


class StageC(nn.Module):
    """The noise in the semantic latents, given the text."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        # What the compressor gives is normalised by these, measured in training, before Stage C sees it.
        self.register_buffer("latent_mean", torch.zeros(cfg.channels))
        self.register_buffer("latent_std", torch.ones(cfg.channels))
        self.text_mapper = nn.Sequential(nn.Linear(cfg.text_width, cfg.width), nn.LeakyReLU(0.2),
                                         nn.Linear(cfg.width, cfg.width))
        self.embed = nn.Linear(cfg.channels, cfg.width)
        self.blocks = nn.ModuleList()
        for _ in range(cfg.depth):
            self.blocks.append(ResBlock(cfg.width, dropout=cfg.dropout))
            self.blocks.append(TimestepBlock(cfg.width, cfg.time_width))
            self.blocks.append(AttnBlock(cfg.width, cfg.width, cfg.heads))
        self.out_norm = layer_norm(cfg.width)
        self.out = nn.Linear(cfg.width, 2 * cfg.channels)

        self.apply(init_weights)
        nn.init.zeros_(self.out.weight)
        for block in self.blocks:
            if isinstance(block, ResBlock):
                block.project.weight.data *= (1 / cfg.depth) ** 0.5
            elif isinstance(block, TimestepBlock):
                nn.init.zeros_(block.mapper.weight)

    def forward(self, x, t, text):
        """x: noisy semantic latents (B, h, w, 16), t (B,) in [0, 1], text (B, L, text_width)
        -> predicted noise (B, h, w, 16)"""
        return self.denoise(x, t, self.read(text))

    def read(self, text):
        """What all steps of a picture share. text (B, L, text_width) -> a list for `denoise`"""
        text = F.silu(self.text_mapper(text))
        return [block.read(text) for block in self.blocks if isinstance(block, AttnBlock)]

    def denoise(self, x, t, read):
        """x (B, h, w, 16), t (B,), read: what `read` gave -> predicted noise (B, h, w, 16)"""
        time, read = time_embedding(t, self.cfg.time_width), iter(read)
        h = self.embed(x)
        for block in self.blocks:
            if isinstance(block, ResBlock):
                h = block(h)
            elif isinstance(block, TimestepBlock):
                h = block(h, time)
            else:
                h = block(h, next(read))
        a, b = self.out(self.out_norm(h)).chunk(2, dim=-1)
        return (x - a) / ((1 - b.float()).abs() + 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# 8. Diffusion, the same for B and C (paper, section 3.2; authors' code). Time t runs from 0 (clean) to 1 (noise).


def alpha_bar(t):
    """Share of the signal's variance left at time t: the cosine schedule. t: tensor in [0, 1] -> same shape, in
    [0.0001, 0.9999]"""
    s = 0.008
    start = math.cos(s / (1 + s) * math.pi / 2) ** 2
    return (torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / start).clamp(0.0001, 0.9999)


def add_noise(x, noise, t):
    """x and noise (B, ...), t (B,) -> noisy x (B, ...)"""
    signal = alpha_bar(t).view(-1, *[1] * (x.dim() - 1))
    return signal.sqrt() * x + (1 - signal).sqrt() * noise


def training_times(n, device):
    """Times to train at, a little outside [0, 1] and clamped, so that both ends are seen. -> (n,)"""
    return ((1 - torch.rand(n, device=device)) * 1.08 + 0.001).clamp(0.001, 1.0)


def diffusion_loss(noise, predicted, t):
    """Squared error of the noise, each sample weighted by P2 (Choi et al., 2022; k = gamma = 1), which spends less on
    times where little noise is left. noise and predicted (B, ...), t (B,) -> scalar"""
    signal = alpha_bar(t)
    weight = 1 / (1 + signal / (1 - signal))
    return (weight * (noise - predicted).square().flatten(1).mean(dim=1)).mean()


def ddpm_step(x, noise, t, t_next, fresh):
    """One ancestral step from time t to t_next < t. x, the predicted noise and fresh normal noise: one shape; t and
    t_next: scalar tensors -> x at t_next"""
    now, after = alpha_bar(t), alpha_bar(t_next)
    alpha = now / after
    mean = (x - (1 - alpha) * noise / (1 - now).sqrt()) / alpha.sqrt()
    std = ((1 - alpha) * (1 - after) / (1 - now)).sqrt()
    return mean + std * fresh * (t_next != 0)


def denoised(x, noise, t):
    """x (B, ...) at time t without the predicted noise: what the network takes the clean latents for"""
    now = alpha_bar(t)
    return (x - (1 - now).sqrt() * noise) / now.sqrt()


def ddim_step(x, noise, t, t_next):
    """One deterministic step (Song et al., 2021) from time t to t_next < t -> x at t_next"""
    after = alpha_bar(t_next)
    return after.sqrt() * denoised(x, noise, t) + (1 - after).sqrt() * noise


def normal_noise(shape, generator, device):
    """Normal noise (B, H, W, C), drawn in NCHW order and on the generator's device: one seed, one picture, wherever the
    model runs and however it lays out its memory. generator: one for the batch (None: PyTorch's own), or a list of B,
    from each of which one picture is drawn, whatever else is in the batch."""
    B, H, W, C = shape
    if isinstance(generator, list):
        return torch.cat([normal_noise((1, H, W, C), one, device) for one in generator])
    noise = torch.randn(B, C, H, W, generator=generator, device=generator.device if generator else device)
    return noise.to(device).permute(0, 2, 3, 1).contiguous()  # laid out like all latents, so rounded like them


def generators(seed, count):
    """seed: None, an int for a batch, or a list of `count` ints (or generators), one a picture -> what `normal_noise`
    takes. ValueError if their number differs."""
    if seed is None or isinstance(seed, (int, torch.Generator)):
        return torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    if len(seed) != count:
        raise ValueError(f"{count} pictures, but {len(seed)} seeds")
    return [generators(one, 1) for one in seed]


# The authors' short list for Stage C: 19 steps down to t = 2/3, ten more to 0.
FAST_TIMES = [1 - i / 57 for i in range(20)] + [(10 - i) / 15 for i in range(1, 11)]


def timesteps(steps, device):
    """steps: how many, evenly spaced from 1 to 0, or the times themselves, falling from at most 1 to 0, else ValueError
    -> tensor (steps + 1,)"""
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"at least 1 step is needed, not {steps}")
        return torch.linspace(1, 0, steps + 1, device=device)
    times = torch.tensor(steps, dtype=torch.float32, device=device)
    if len(times) < 2 or times[0] > 1 or times[-1] != 0 or not (times.diff() < 0).all():
        raise ValueError(f"timesteps must fall from at most 1 to 0, not {', '.join(f'{t:g}' for t in steps)}")
    return times


@torch.no_grad()
def sample(network, shape, timesteps, conditions, guidance=1.0, generator=None, sampler="ddpm", progress=iter,
           start=None, keep=None, callback=lambda step, t, x: None):
    """From noise to latents.

    network(x, t, *conditions) gives the noise; shape (B, H, W, C); timesteps: falling tensor from 1 to 0 (n + 1,);
    guidance > 1: `conditions` hold 2·B rows, the conditional ones first, and the result is pushed away from the
    unconditional prediction (Ho and Salimans, 2022). sampler: "ddpm" or "ddim". start (B, H, W, C): latents to begin
    with, noised to the first of the times, instead of noise alone (Meng et al., 2022). keep: known latents
    (B, H, W, C) and a bool mask (B, H, W, 1), where to put them back after each step, noised to its level (as Lugmayr
    et al., 2022, do). callback(step, t, x) after each step: x is what the network, at time t, takes the clean latents
    for -> (B, H, W, C)"""
    device = timesteps.device
    first = x = normal_noise(shape, generator, device)
    if start is not None:
        x = add_noise(start, x, timesteps[:1])
    for step, (t, t_next) in enumerate(progress(list(zip(timesteps[:-1], timesteps[1:])))):
        if guidance > 1:
            noise, unconditional = network(torch.cat([x, x]), t.expand(2 * len(x)), *conditions).chunk(2)
            noise = torch.lerp(unconditional, noise, guidance)
        else:
            noise = network(x, t.expand(len(x)), *conditions)
        estimate = denoised(x, noise, t)
        if sampler == "ddpm":
            x = ddpm_step(x, noise, t, t_next, normal_noise(shape, generator, device))
        else:
            x = ddim_step(x, noise, t, t_next)
        if keep is not None:  # always the same noise: it takes no random numbers from what is drawn beside it
            known, mask = keep
            x = torch.where(mask, add_noise(known, first, t_next.view(1)) if t_next > 0 else known, x)
        callback(step, t, estimate)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# 9. Wuerstchen: all of it together.

STAGES = {  # file in a run folder: the networks in it
    "text": ("text_b", "compressor"),  # the contrastive picture tower is where Stage B's compressor starts
    "a": ("a",),
    "b": ("compressor", "b"),
    "c": ("text", "c"),  # each stage has a text encoder of its own; C's begins as B's
}


def negatives(prompts, negative):
    """A negative prompt for each prompt; one string serves all. ValueError if their numbers differ."""
    negative = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if len(negative) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(negative)} negative ones")
    return negative


def save_config(folder, config, tokenizer):
    """Writes config.json and tokenizer/."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    tokenizer.save(folder / "tokenizer")


def save_whole(path, state):
    """torch.save, so that a crash at any moment leaves the old file or the new one, whole. OSError, and the old file,
    if it can't be written."""
    try:
        with open(f"{path}.new", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)
    except (OSError, RuntimeError) as error:  # torch has its own kind for a full disk
        Path(f"{path}.new").unlink(missing_ok=True)
        kept = "; the one before is kept" if Path(path).exists() else ""
        raise OSError(f"{path} can't be written{kept}: {error}") from None


class Wuerstchen(nn.Module):
    """The whole system: a caption's text, Stage C, Stage B and Stage A's decoder draw a picture."""

    def __init__(self, config, tokenizer, tokenizer_b=None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.tokenizer_b = tokenizer_b or tokenizer
        self.text = TextEncoder(config.text)
        self.text_b = TextEncoder(config.text_b)
        self.a = VQGAN(config.a)
        self.compressor = SemanticCompressor(config.compressor)
        self.b = StageB(config.b)
        self.c = StageC(config.c)
        self.source = None  # set where networks come from disk when they are needed

    @property
    def device(self):
        return self.source["device"] if self.source else self.c.latent_mean.device

    @contextmanager
    def at_hand(self, name):
        """A network by name, ready to use: with little memory it is read now and dropped afterwards."""
        network = getattr(self, name)
        if self.source:
            load_official(self, name, **self.source)
        # Half-precision weights (of the hub's snapshots) need half-precision products. Latents between steps stay
        # float32.
        dtype = next(p.dtype for p in network.parameters() if p.dim() > 1)
        with nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype):
            try:
                yield network
            finally:
                if self.source:
                    network.to("meta")

    def encode_text(self, prompts, stage):
        """What a stage, "b" or "c", is told. prompts: list of B strings -> (B, L, width)"""
        name, tokenizer = ("text_b", self.tokenizer_b) if stage == "b" else ("text", self.tokenizer)
        ids, mask = tokenizer(prompts)
        with self.at_hand(name) as text:
            return text(ids.to(self.device), mask.to(self.device)).float()

    def compress(self, images):
        """images (B, H, W, 3) in [0, 1] -> semantic latents (B, hs, ws, 16). ValueError where a side is no multiple of
        `config.stride`, or the published compressor isn't there."""
        H, W = images.shape[1:3]
        if H % self.config.stride or W % self.config.stride:
            raise ValueError(f"picture sides must be multiples of {self.config.stride}, not {H}x{W}")
        if self.compressor is None:
            raise ValueError("no EfficientNetEncoder beside the snapshots: it compresses pictures")
        with self.at_hand("compressor") as compressor:
            return compressor(shrink(images)).float()

    @torch.no_grad()
    def sample_c(self, prompts, negative="", size=None, steps=60, guidance=4.0, start=None, strength=1.0, keep=None,
                 callback=lambda step, t, x: None, **options):
        """Stage C: prompts (list of B) -> semantic latents (B, *size, 16); size: (hs, ws), None for the trained one.
        start: semantic latents to begin with, at time `strength`: the times above are left out; at 1, when nothing is
        left of them, C begins with noise alone. keep: see `sample`; its latents, start and callback's x are semantic
        latents as `compress` gives them."""
        shape = (len(prompts), *(size or (self.config.cells,) * 2), self.config.c.channels)
        text = self.encode_text(prompts + negatives(prompts, negative) if guidance > 1 else prompts, "c")
        times = timesteps(steps, self.device)
        with self.at_hand("c") as c:
            if strength < 1:
                times = torch.cat([times.new_tensor([strength]), times[times < strength]])
                options["start"] = (start - c.latent_mean) / c.latent_std
            if keep is not None:
                options["keep"] = (keep[0] - c.latent_mean) / c.latent_std, keep[1]
            x = sample(c.denoise, shape, times, (c.read(text),), guidance, **options,
                       callback=lambda step, t, x: callback(step, t, x * c.latent_std + c.latent_mean))
            return x * c.latent_std + c.latent_mean

    @torch.no_grad()
    def sample_b(self, semantic, prompts, negative="", size=None, steps=12, guidance=1.0, **options):
        """Stages B and A: semantic latents (B, hs, ws, 16), prompts (list of B) -> images (B, H, W, 3) in [0, 1];
        size: Stage A's latents (h, w), None for the trained one"""
        side = self.config.image_size // 4
        shape = (len(prompts), *(size or (side, side)), self.config.a.latent_channels)
        if guidance > 1:
            prompts = prompts + negatives(prompts, negative)
            semantic = torch.cat([semantic, torch.zeros_like(semantic)])
        text = self.encode_text(prompts, "b")
        with self.at_hand("b") as b:
            read = b.read(semantic, text, shape[1:3])
            latents = sample(b.denoise, shape, timesteps(steps, self.device), (read,), guidance, **options)
        with self.at_hand("a") as a:
            return a.decode(latents * a.scale).float().clamp(0, 1)

    def generate(self, prompts, negative="", height=None, width=None, steps_c=60, guidance_c=4.0, steps_b=12,
                 guidance_b=1.0, seed=None, sampler="ddpm", progress=lambda steps, stage: steps,
                 callback=lambda step, t, x, stage: None, sizes=None, start=None, strength=1.0, keep_c=None,
                 keep_b=None):
        """Draws a picture for each prompt. The ways of drawing below are this one with another beginning.

        prompts: list of B strings; negative: what to keep away from, one string or B of them; height and width in
        pixels (None: as trained), rounded to what the stages can draw; steps_c and steps_b: how many, or the falling
        times from 1 to 0 (FAST_TIMES); guidance 1 means none; seed: of all random numbers, drawn in the order of
        diffusers' WuerstchenCombinedPipeline, or B seeds: then a picture is the same in every batch, but for rounding;
        sampler "ddpm" or "ddim"; progress(list of steps, "c" or "b") may wrap them in a bar;
        callback(step, t, x, "c" or "b") is called after each step, x being what the stage then takes the clean latents
        for (C: as `compress` gives them; B: Stage A's, divided by its scale).
        From `redraw` and `fill`: sizes of the semantic latents and of Stage A's, instead of height and width; start:
        semantic latents that C begins with at time `strength`, at 0 they are taken as they are; keep_c, keep_b: what
        the stages leave as it is, see `sample`.
        -> images (B, H, W, 3) in [0, 1]. ValueError if there is no prompt, or for a strength outside [0, 1]."""
        if not prompts:
            raise ValueError("no prompt given")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, not {strength}")
        generator = generators(seed, len(prompts))
        cells, latents = sizes or self.config.grid(height or self.config.image_size, width or self.config.image_size)

        def options(stage):
            return dict(generator=generator, sampler=sampler, progress=lambda steps: progress(steps, stage),
                        callback=lambda *now: callback(*now, stage))

        semantic = start if strength == 0 else self.sample_c(prompts, negative, cells, steps_c, guidance_c, start,
                                                             strength, keep_c, **options("c"))
        return self.sample_b(semantic, prompts, negative, latents, steps_b, guidance_b, keep=keep_b, **options("b"))

    @torch.no_grad()
    def redraw(self, images, prompts, strength=0.6, **options):
        """Draws prompts over pictures: Stage C begins with their noised semantic latents.

        images (B, H, W, 3) in [0, 1], sides multiples of `config.stride`, else ValueError; prompts: list of B;
        strength: how much noise, 0 (the picture rebuilt) to 1 (the prompt drawn as if there were no picture);
        options: those of `generate` -> like images"""
        semantic, (H, W) = self.compress(images), images.shape[1:3]
        return self.generate(prompts, sizes=(semantic.shape[1:3], (H // 4, W // 4)), start=semantic, strength=strength,
                             **options)

    def vary(self, images, prompts=None, **options):
        """Pictures with the semantic latents of others: Stage B alone draws, from new noise. images (B, H, W, 3) in
        [0, 1]; prompts: list of B for Stage B, "" if None; options: those of `generate` -> like images"""
        return self.redraw(images, prompts or [""] * len(images), strength=0, **options)

    @torch.no_grad()
    def reconstruct(self, images, prompts=None, **options):
        """What each half of the compression keeps of a picture.

        images (B, H, W, 3) in [0, 1], sides multiples of `config.stride`; prompts: list of B captions, "" if None;
        options: those of `generate` -> (by Stage A alone, 4x smaller and quantized; by Stage B from the semantic
        latents, 42x smaller), both like images. ValueError if the sides don't divide."""
        from_b = self.vary(images, prompts, **options)
        with self.at_hand("a") as a:
            return a(images)[0].float().clamp(0, 1), from_b

    @torch.no_grad()
    def mix(self, images, count=7, prompt="", seed=0, **options):
        """A strip from one picture to another, by way of the semantic latents between theirs; all from the same noise.
        images (2, H, W, 3) in [0, 1]; prompt: Stage B's; seed: int; options: those of `generate`
        -> (count, H, W, 3), first and last what `vary` makes of the two with this seed"""
        first, last = self.compress(images)
        way = torch.linspace(0, 1, count, device=first.device).view(-1, 1, 1, 1)
        H, W = images.shape[1:3]
        return self.generate([prompt] * count, sizes=(first.shape[:2], (H // 4, W // 4)), start=torch.lerp(
            first, last, way), strength=0, seed=[seed] * count, **options)

    @torch.no_grad()
    def fill(self, images, masks, prompts, **options):
        """Draws the masked parts of pictures anew and leaves the rest, in Stage C's latents and in B's.

        images (B, H, W, 3) in [0, 1], sides multiples of `config.stride`; masks (B, H, W) bool, True: to be drawn;
        a latent or a semantic cell is redrawn where any of its pixels is. prompts: list of B, what the whole picture
        shows; options: those of `generate` -> like images: away from the mask what Stage A makes of them, as its
        latents are kept as they are. ValueError if the sides don't divide, or those of a mask differ."""
        if masks.shape != images.shape[:3]:
            raise ValueError(f"the mask is {masks.shape[2]}x{masks.shape[1]} pixels, the picture {images.shape[2]}x"
                             f"{images.shape[1]}")
        semantic = self.compress(images)
        with self.at_hand("a") as a:
            latents = a.encode(images).float() / a.scale
        sizes = semantic.shape[1:3], latents.shape[1:3]
        drawn = masks[:, None].float().cpu()  # MPS pools only where sizes divide
        keep_c, keep_b = ((known, F.adaptive_max_pool2d(drawn, size).movedim(1, -1).to(self.device) == 0)
                          for known, size in zip((semantic, latents), sizes))
        return self.generate(prompts, sizes=sizes, keep_c=keep_c, keep_b=keep_b, **options)

    def film(self, prompts, seeds, steps_film=4, **options):
        """The pictures appearing: what Stage C takes them for at each of its steps, drawn by Stage B in few steps, from
        the noise that it draws the pictures from in the end. prompts: list of B; seeds: B ints; options: those of
        `generate` -> list of images (B, H, W, 3) in [0, 1], one a step, and the pictures that `generate` draws"""
        of_c, of_b, estimates = generators(seeds, len(prompts)), [], []

        def watch(step, t, x, stage):
            if stage == "c":
                estimates.append(x)
                of_b[:] = [one.clone_state() for one in of_c]  # after C's last step, where B's random numbers begin

        images = self.generate(prompts, seed=of_c, callback=watch, **options)
        sizes = estimates[0].shape[1:3], [side // 4 for side in images.shape[1:3]]
        return [self.generate(prompts, sizes=sizes, start=x, strength=0, steps_b=steps_film,
                              seed=[one.clone_state() for one in of_b]) for x in estimates] + [images]

    def save_stage(self, folder, stage):
        """Writes one stage's networks to <stage>.pt."""
        weights = {name: getattr(self, name).state_dict() for name in STAGES[stage] if getattr(self, name) is not None}
        save_whole(Path(folder) / f"{stage}.pt", weights)

    def save(self, folder):
        """Writes everything that `load` reads: config.json, tokenizer/ and a file a stage. ValueError where weights are
        only read when needed."""
        if self.source:
            raise ValueError("with low_memory there are no weights to save: they lie in the snapshots")
        save_config(folder, self.config, self.tokenizer)
        if self.tokenizer_b is not self.tokenizer:
            self.tokenizer_b.save(Path(folder) / "tokenizer_b")
        for stage in STAGES:
            self.save_stage(folder, stage)

    def load_stage(self, folder, stage):
        """Reads <stage>.pt. FileNotFoundError if the stage isn't trained yet, ValueError if it doesn't fit."""
        path = Path(folder) / f"{stage}.pt"
        if not path.exists():
            raise FileNotFoundError(f"no {path}: train it first: python train.py {stage} --run {folder}")
        try:
            for name, weights in torch.load(path, map_location=self.device, weights_only=True).items():
                getattr(self, name).load_state_dict(weights)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
            raise ValueError(f"{path} is damaged, or of another preset or an older layout than config.json beside it: "
                             f"{(str(error).strip() or repr(error)).splitlines()[0]}") from None

    @classmethod
    def load(cls, folder, stages=tuple(STAGES)):
        """A model from a run folder, in evaluation mode. FileNotFoundError if the folder or a stage is missing."""
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"no run in {folder}: train it first: python train.py --run {folder}")
        config = Config.from_dict(read_json(folder / "config.json"))
        tokenizers = [Tokenizer.load(path) for path in (folder / "tokenizer", folder / "tokenizer_b") if path.exists()]
        model = cls(config, *tokenizers)
        for stage in stages:
            model.load_stage(folder, stage)
        return model.eval()

    @classmethod
    def from_official(cls, folder, device="cpu", dtype=torch.float32, low_memory=False):
        """The published model, from local copies of the hub's snapshots `wuerstchen-prior`, `wuerstchen` and, where
        `reconstruct` is wanted, `EfficientNetEncoder` in one folder; sizes are those of their configurations.

        dtype: of matrices and kernels; low_memory: every network is read when it is needed and dropped after use.
        FileNotFoundError or ValueError says in one line what is missing or wrong."""
        config = official_config(folder)
        tokenizer, tokenizer_b = (Tokenizer.load(Path(folder) / snapshot / "tokenizer")
                                  for snapshot in ("wuerstchen-prior", "wuerstchen"))
        with torch.device("meta"):
            model = cls(config, tokenizer, tokenizer_b).eval()
        source = dict(folder=folder, device=torch.device(device), dtype=dtype)
        if not (Path(folder) / OFFICIAL_FOLDERS["compressor"]).exists():
            model.compressor = None
        for name, place in OFFICIAL_FOLDERS.items():
            if getattr(model, name) is not None:
                find_weights(Path(folder) / place)  # complain now, not after minutes of drawing
                if not low_memory:
                    load_official(model, name, **source)
        model.source = source if low_memory else None
        return model


# ----------------------------------------------------------------------------------------------------------------------
# 10. The published weights, as they lie on the hub. Nothing here computes: it maps names and reads files.

OFFICIAL_FOLDERS = {"text": "wuerstchen-prior/text_encoder", "c": "wuerstchen-prior/prior",
                    "text_b": "wuerstchen/text_encoder", "b": "wuerstchen/decoder", "a": "wuerstchen/vqgan",
                    "compressor": "EfficientNetEncoder"}

# What to replace in our names, in turn, to get theirs (regular expressions).
TEXT_NAMES = {"^tokens": "embeddings.token_embedding", "^positions": "embeddings.position_embedding.weight",
              "^layers": "encoder.layers", "norm([12])": r"layer_norm\1", r"attention\.([qkv])": r"self_attn.\1_proj",
              "attention.out": "self_attn.out_proj", "expand": "mlp.fc1", "project": "mlp.fc2",
              "^norm": "final_layer_norm"}
BLOCK_NAMES = {r"\.expand": ".channelwise.0", "grn": "channelwise.2", r"\.project\.": ".channelwise.4.",
               r"\.kv": ".kv_mapper.1", r"attention\.([qkv])": r"attention.to_\1",
               "attention.out": "attention.to_out.0"}
OFFICIAL_NAMES = {
    "text": TEXT_NAMES,
    "text_b": TEXT_NAMES,
    "a": {"^from_pixels": "in_block.1", "^encoder": "down_blocks", "^to_latents": "down_blocks.3.0",
          "^latent_norm": "down_blocks.3.1", "quantizer.codebook": "vquantizer.embedding.weight",
          "^from_latents": "up_blocks.0.0", r"^decoder\.(\d+)": lambda m: f"up_blocks.{int(m[1]) + 1}",
          "^to_pixels": "out_block.0", "depthwise": "depthwise.1", "expand": "channelwise.0",
          "project": "channelwise.2"},
    "compressor": {"^mapper": "mapper.0", "^norm": "mapper.1", "backbone.stages": "backbone", "layers": "block",
                   "squeeze": "fc1", "excite": "fc2"},
    "b": {"^text_mapper": "clip_mapper", r"^down\.(\d)\.mapper": r"effnet_mappers.\1",
          # those of the way up, lowest level first, follow those of the four levels of the way down
          r"^up\.(\d)\.mapper": lambda m: f"effnet_mappers.{int(m[1]) + 4}",
          r"^(down|up)\.(\d)\.blocks": r"\1_blocks.\2", "^embed": "embedding.1", "^out": "clf.1", **BLOCK_NAMES},
    "c": {"^text_mapper": "cond_mapper", "^embed": "projection", "^out": "out.1", **BLOCK_NAMES},
}


def official_name(part, name):
    """The hub's name for a tensor of one of our networks."""
    for ours, theirs in OFFICIAL_NAMES[part].items():
        name = re.sub(ours, theirs, name)
    return name


def text_sizes(c):
    return TextConfig(c["vocab_size"], c["max_position_embeddings"], c["hidden_size"], c["num_hidden_layers"],
                      c["num_attention_heads"], c["intermediate_size"], c["hidden_act"])


# Our sizes from their config.json. Keys that aren't asked for don't matter.
OFFICIAL_SIZES = {
    "text": text_sizes,
    "text_b": text_sizes,
    "a": lambda c: VQGANConfig((c["embed_dim"] // 2, c["embed_dim"]), c["bottleneck_blocks"], c["latent_channels"],
                               c["num_vq_embeddings"], c["scale_factor"]),
    "b": lambda c: StageBConfig(c["c_hidden"], c["blocks"], [max(0, heads) for heads in c["nhead"]], c["inject_effnet"],
                                c["c_cond"], c["clip_embd"], c["patch_size"], c["dropout"], c["c_in"],
                                c["effnet_embd"], c["c_r"]),
    "c": lambda c: StageCConfig(c["c"], c["depth"], c["nhead"], c["c_cond"], c["dropout"], c["c_in"], c["c_r"]),
}


def official_config(folder):
    """The sizes in the snapshots' configurations -> Config. FileNotFoundError or ValueError names a bad one."""
    sizes = {}
    for name, read_sizes in OFFICIAL_SIZES.items():
        path = Path(folder) / OFFICIAL_FOLDERS[name] / "config.json"
        try:
            sizes[name] = read_sizes(read_json(path))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the configuration expected: {error!r}") from None
    return Config(**sizes)


def load_official(model, name, folder, device, dtype):
    """Fills one network of a model with its snapshot's weights."""
    path = Path(folder) / OFFICIAL_FOLDERS[name]
    known = {}  # what the published pipelines know besides the weights
    if name == "a":
        known["scale"] = torch.tensor(model.config.a.scale)
    elif name == "c":  # a semantic latent e is to Stage C (e + 1) / 42
        known["latent_mean"] = torch.full((model.config.c.channels,), -1.0)
        known["latent_std"] = torch.full((model.config.c.channels,), 42.0)
    fill(getattr(model, name), name, read_weights(path), path, known, dtype)
    getattr(model, name).to(device)


def fill(network, name, weights, path="weights", known={}, dtype=torch.float32):
    """Gives a network weights {official name: tensor}, and those already `known` by our name. ValueError names a tensor
    that is missing, that nothing asks for, or that has another shape."""
    weights = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()  # as older files have them
               if not key.endswith("position_ids")}
    ours, filled = network.state_dict(), dict(known)
    theirs = {key: official_name(name, key) for key in ours if key not in known}
    asked = set(theirs.values())
    for what, keys in (("lacks", asked - set(weights)), ("has an unknown", set(weights) - asked)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{path} {what} tensor {min(keys)}{more}")
    for key in theirs:
        tensor, shape = weights[theirs[key]], ours[key].shape
        # Axes of size 1 may differ: a 1x1 convolution is a Linear here.
        if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
            raise ValueError(f"{path}: {theirs[key]} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.is_floating_point():  # vectors are small, and norms want them exact
            tensor = tensor.to(dtype if len(shape) > 1 else torch.float32)
        filled[key] = tensor.reshape(shape)
    network.load_state_dict(filled, assign=True)


def find_weights(folder):
    """The files that hold a component's tensors: *.safetensors or, where there is none, *.bin -> list of paths"""
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not found:
        raise FileNotFoundError(f"no weights (*.safetensors, *.bin) in {folder}")
    # Large components may come in parts; otherwise the shortest name is the plain one, without ".fp16" and the like.
    return [path for path in found if "-of-" in path.name] or [min(found, key=lambda path: len(path.name))]


def read_weights(folder):
    """All tensors of a snapshot's component -> {name: tensor}"""
    return {name: tensor for path in find_weights(folder)
            for name, tensor in (read_safetensors if path.suffix == ".safetensors" else read_bin)(path).items()}


def read_bin(path):
    """A file of torch.save, tensors only: code in it is refused, not run. -> {name: tensor}"""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        weights = None
    if not isinstance(weights, dict) or not all(torch.is_tensor(tensor) for tensor in weights.values()):
        raise ValueError(f"{path} is damaged, or holds something else than tensors")
    return weights


SAFETENSORS_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path):
    """A safetensors file: 8 bytes of header length, a JSON header, then the tensors' bytes, without gaps. The tensors
    lie in the file's mapped memory, so only what is used is read. ValueError if anything doesn't fit
    -> {name: tensor}"""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{path} is no safetensors file, or is cut off")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        header = json.loads(data[8:8 + length])
        header.pop("__metadata__", None)
        tensors, end = {}, 0  # offsets count from the header's end
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, stop) = SAFETENSORS_TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            if start != end or stop - start != count * dtype.itemsize or min(shape, default=0) < 0:
                raise ValueError
            end = stop
            if count:
                tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + start).view(shape)
            else:
                tensors[name] = torch.empty(shape, dtype=dtype)
        if 8 + length + end != size:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError):
        raise ValueError(f"{path} is damaged: its header doesn't fit its {size} bytes") from None
    return tensors
