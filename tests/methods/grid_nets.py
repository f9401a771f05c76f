"""Nets with a grid, for methods that read one, and transformers that give their own attention maps."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Gap(nn.Module):
    """Convolution, ReLU, mean over positions, linear: the network that CAM was made for. `bias` of the head."""

    def __init__(self, channels: int = 3, maps: int = 4, *, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, maps, 3, 2, 1), nn.Linear(maps, 5, bias=bias)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Tail(nn.Module):
    """Features, then a tail without biases: positively homogeneous in the features."""

    def __init__(self, channels: int = 3, maps: int = 4, side: int = 4) -> None:
        super().__init__()
        self.conv, self.second = nn.Conv2d(channels, maps, 3, 2, 1), nn.Conv2d(maps, 6, 3, 1, 1, bias=False)
        self.head = nn.Linear(6 * side * side, 5, bias=False)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.features(x))).flatten(1))


class AnyRank(nn.Module):
    """Convolution, ReLU, linear on samples of one to three axes of positions."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape) - 1]
        self.conv, self.head = kind(shape[0], 4, 3, padding=1), nn.Linear(4 * math.prod(shape[1:]), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).flatten(1))


class Attention(nn.Module):
    """Self-attention in one of three spellings: by torch's function, by hand, by bmm over merged heads."""

    def __init__(self, width: int, heads: int, how: str) -> None:
        super().__init__()
        self.heads, self.how, self.qkv, self.out = heads, how, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def weights(self, x: Tensor) -> Tensor:
        q, k, _ = self.split(x)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.split(x)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "open":
            y = F.dropout((q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1), 0.1, self.training) @ v
        else:
            q, k, v = (t.reshape(n * self.heads, length, -1) for t in (q, k, v))
            y = (torch.bmm(q, k.transpose(1, 2)) / (width // self.heads) ** 0.5).softmax(-1).bmm(v)
            y = y.view(n, self.heads, length, -1)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class TinyVit(nn.Module):
    """A vision transformer: `tokens` extra ones in front, read by the class token or by the mean of the patches."""

    def __init__(
        self,
        shape: tuple[int, ...] = (2, 9, 13),
        how: str = "fused",
        *,
        tokens: int = 1,
        layers: int = 2,
        width: int = 8,
    ) -> None:
        super().__init__()
        rank = len(shape) - 1
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.patches = kind(shape[0], width, 3 if rank == 2 else 2, 3 if rank == 2 else 2)
        count = math.prod(self.patches(torch.zeros(1, *shape)).shape[2:])
        self.extra = nn.Parameter(torch.randn(1, tokens, width)) if tokens else None
        self.positions = nn.Parameter(torch.randn(1, count + tokens, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2 * layers + 1)])
        self.blocks = nn.ModuleList([Attention(width, 2, how) for _ in range(layers)])
        self.mlps = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, width)) for _ in range(layers)]
        )
        self.head, self.tokens = nn.Linear(width, 3), tokens

    def embed(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.extra is not None:
            x = torch.cat([self.extra.expand(x.shape[0], -1, -1), x], 1)
        return x + self.positions

    def maps(self, x: Tensor) -> list[Tensor]:
        """The attention of each layer, (N, heads, T, T)."""
        x, found = self.embed(x), []
        for i, (block, mlp) in enumerate(zip(self.blocks, self.mlps, strict=True)):
            normed = self.norms[2 * i](x)
            found.append(block.weights(normed))
            x = x + block(normed)
            x = x + mlp(self.norms[2 * i + 1](x))
        return found

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, (block, mlp) in enumerate(zip(self.blocks, self.mlps, strict=True)):
            x = x + block(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        x = self.norms[-1](x)
        return self.head(x[:, 0] if self.tokens else x.mean(1))
