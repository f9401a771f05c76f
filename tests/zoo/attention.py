"""Transformers, small: attention in each of its spellings."""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Sequential):
    """The MLP of a transformer block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Dropout(0.1), nn.Linear(inner, width))


class FusedAttention(nn.Module):
    """Heads split by hand, the product by torch's fused function."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.out(x.transpose(1, 2).reshape(n, length, width))


class ModuleAttention(nn.Module):
    """torch's own module, whose fast path a trace without gradients takes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class VitBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention, self.mlp = attention, FeedForward(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Dosovitskiy 2021: patches, a class token, learned positions."""

    def __init__(self, fused: bool, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        attention = FusedAttention if fused else ModuleAttention
        self.blocks = nn.Sequential(*(VitBlock(width, attention(width, 2)) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class WindowAttention(nn.Module):
    """Attention within windows, with a table of biases by relative position, and a mask where they were shifted."""

    relative: Tensor
    mask: Tensor

    def __init__(self, width: int, heads: int, window: int, size: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.1)
        axis = torch.arange(window)
        places = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
        offsets = (places[:, :, None] - places[:, None]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative", (offsets[..., 0] * (2 * window - 1) + offsets[..., 1]).flatten())
        regions = torch.zeros(size, size)
        for i, rows in enumerate((slice(0, -window), slice(-window, -shift or None), slice(-shift, None))):
            for j, columns in enumerate((slice(0, -window), slice(-window, -shift or None), slice(-shift, None))):
                regions[rows, columns] = 3 * i + j
        count = size // window
        regions = regions.view(count, window, count, window).permute(0, 2, 1, 3).reshape(-1, window * window)
        same = regions[:, None] == regions[:, :, None]
        self.register_buffer("mask", torch.zeros(same.shape).masked_fill(~same, -100.0))

    def forward(self, x: Tensor) -> Tensor:
        n, high, wide, width = x.shape
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        w = self.window
        x = x.view(n, high // w, w, wide // w, w, width).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, width)
        qkv = self.qkv(x).reshape(x.size(0), w * w, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * (width // self.heads) ** -0.5).matmul(k.transpose(-2, -1))
        bias = self.table[self.relative].view(w * w, w * w, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        scores = scores + bias
        if self.shift > 0:
            count = self.mask.size(0)
            scores = scores.view(n, count, self.heads, w * w, w * w) + self.mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, w * w, w * w)
        x = F.softmax(scores, dim=-1).matmul(v).transpose(1, 2).reshape(-1, w * w, width)
        x = self.proj(x).view(n, high // w, wide // w, w, w, width).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(n, high, wide, width)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x


class SwinBlock(nn.Module):
    """Windows, plain or shifted."""

    def __init__(self, width: int, size: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = WindowAttention(width, 2, 4, size, shift), FeedForward(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Liu 2021: shifted windows, patches merged between the stages."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.embed, self.norm0 = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.stage1 = nn.Sequential(SwinBlock(width, 8, 0), SwinBlock(width, 8, 2))
        self.norm1, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)
        self.stage2, self.norm2 = SwinBlock(2 * width, 4, 0), nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.norm0(self.embed(x).permute(0, 2, 3, 1)))
        high, wide = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, wide % 2, 0, high % 2))
        x = torch.cat([x[..., 0::2, 0::2, :], x[..., 1::2, 0::2, :], x[..., 0::2, 1::2, :], x[..., 1::2, 1::2, :]], -1)
        x = self.norm2(self.stage2(self.reduce(self.norm1(x))))
        return self.head(F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1).flatten(1))


class MixerBlock(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = FeedForward(tokens, 10), FeedForward(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Tolstikhin 2021: no attention at all."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList([MixerBlock(16, width) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("nchw->nhwc", self.stem(x)).flatten(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


class Encoder(nn.Module):
    """Vaswani 2017, by torch's own encoder, whose fast path a trace without gradients takes."""

    def __init__(self, norm_first: bool, batch_first: bool = True, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 2, 12, activation="gelu" if norm_first else "relu", batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=batch_first and not norm_first
        )
        self.head, self.batch_first = nn.Linear(width, classes), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x if self.batch_first else x.transpose(0, 1))
        return self.head(x.mean(1 if self.batch_first else 0))


class Translator(nn.Module):
    """Vaswani 2017, whole: two inputs, a causal mask, sinusoidal positions, attention weights as a second output."""

    positions: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.transformer = nn.Transformer(width, 2, 1, 1, 12, batch_first=True)
        self.look = nn.MultiheadAttention(width, 2, kdim=width, vdim=width, batch_first=True, add_bias_kv=True)
        place = torch.arange(12.0)[:, None] * torch.exp(torch.arange(0, width, 2.0) * (-math.log(10000.0) / width))
        self.register_buffer("positions", torch.stack([place.sin(), place.cos()], dim=2).flatten(1)[None].clone())

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Optional[Tensor]]:  # noqa: UP045
        source = source + self.positions[:, : source.size(1)]
        target = target + self.positions[:, : target.size(1)]
        mask = torch.triu(torch.full((target.size(1), target.size(1)), float("-inf"), dtype=target.dtype), diagonal=1)
        mixed = self.transformer(source, target, tgt_mask=mask, src_is_causal=False, tgt_is_causal=True)
        found, weights = self.look(mixed, source, source)
        return found, weights


class LlamaBlock(nn.Module):
    """Root-mean-square norm, rotary positions, shared keys and values, a gated MLP, causal attention."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, width: int, length: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(width, size, bias=False) for size in (width, width // 2, width // 2))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up, self.down = (nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width))
        angle = torch.arange(float(length))[:, None] * 10000.0 ** (-torch.arange(0, width // 2, 2.0) / (width // 2))
        angle = torch.cat([angle, angle], dim=1)
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        half = torch.cat([-second, first], dim=-1)
        return x * self.cosine[: x.size(2)] + half * self.sine[: x.size(2)]

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        y = self.norm1(x)
        q = self.q(y).view(n, length, -1, width // 2).transpose(1, 2)
        k = self.k(y).view(n, length, -1, width // 2).transpose(1, 2)
        v = self.v(y).view(n, length, -1, width // 2).transpose(1, 2)
        k, v = self.turned(k).repeat_interleave(2, dim=1), v.expand(n, 2, length, width // 2)
        y = F.scaled_dot_product_attention(self.turned(q), k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(n, length, width))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Touvron 2023: token ids in, the logits of the next one out; embedding and head share their weight."""

    def __init__(self, width: int = 8, words: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList([LlamaBlock(width) for _ in range(2)])
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, -1]


class Bert(nn.Module):
    """Devlin 2019: words and positions, a mask for what is padding (id 0), torch's own layer, a pooled first token."""

    def __init__(self, width: int = 8, words: int = 11, classes: int = 3) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width, padding_idx=0), nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layer = nn.TransformerEncoderLayer(width, 2, 12, activation="gelu", batch_first=True)
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.size(1), device=ids.device).unsqueeze(0).expand_as(ids)
        x = self.norm(self.words(ids) + self.positions(places))
        x = self.layer(x, src_key_padding_mask=ids == 0)
        return self.head(torch.tanh(self.pool(x[:, 0])))
