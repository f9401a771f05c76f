"""Small architectures that hold what importers trip over, and how they are saved and compared."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attrcli import formats
from attrcli.formats.spec import Sample
from attrcli.graph.build import FREE

# --- saving


@contextmanager
def quiet() -> Iterator[None]:
    """torch.jit and torch.export warn of their own deprecations, and of what a trace bakes in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ready(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module for inference, with statistics and weights that no test passes by accident."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator) * 0.3
            tensor.data = (tensor.data * 0.5 + noise if tensor.dim() < 2 else tensor.data + 0.1 * (noise - 0.15)).to(
                dtype
            )
    return module.to(dtype).eval()


def save_scripted(module: nn.Module, path: Path, *, frozen: bool = False) -> Path:
    with quiet():
        script = torch.jit.script(module)
        (torch.jit.freeze(script) if frozen else script).save(path)
    return path


def save_traced(module: nn.Module, shape: tuple[int, ...], path: Path, batch: int = 2) -> Path:
    dtype = next((p.dtype for p in module.parameters()), torch.float64)
    with quiet():
        torch.jit.trace(module, torch.rand(batch, *shape, dtype=dtype), check_trace=False).save(path)
    return path


def exported(module: nn.Module, shape: tuple[int, ...], batch: int | None = None) -> torch.export.ExportedProgram:
    """Export with a free batch, or with this one."""
    dtype = next((p.dtype for p in module.parameters()), torch.float64)
    free = None if batch else ({0: torch.export.Dim("batch", min=1, max=4096)},)
    with quiet():
        return torch.export.export(module, (torch.rand(batch or 3, *shape, dtype=dtype),), dynamic_shapes=free)


def save_exported(module: nn.Module, shape: tuple[int, ...], path: Path, *, batch: int | None = None) -> Path:
    with quiet():
        torch.export.save(exported(module, shape, batch), path)
    return path


def load_script(path: Path) -> Callable[..., Any]:
    """The ScriptModule as an oracle: unoptimised, since fused nodes and symbolic derivatives are not exact."""
    with quiet():
        module = torch.jit.load(path)

    def run(*inputs: Tensor) -> Any:
        with quiet(), torch.jit.optimized_execution(False):
            return module(*inputs)

    return run


# --- comparing


def build(
    path: Path, shape: tuple[int, ...], *, batches: tuple[int, int] = FREE, dtype: Any = torch.float64
) -> fx.GraphModule:
    """The graph of a file with one input."""
    source = formats.load(path)
    (spec,) = source.inputs
    return source.build({spec.name: Sample(shape, torch.float32)}, dtype, batches)


def assert_same(
    ours: Callable[..., Any], oracle: Callable[..., Any], shape: tuple[int, ...], batches: tuple[int, ...] = (1, 3, 5)
) -> None:
    """Outputs and gradients of a graph equal the oracle's, in float64.

    Where torch cannot differentiate what is written in place, the gradient must equal a difference quotient.
    """
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, *shape, dtype=torch.float64, generator=generator).requires_grad_()
        mine = ours(x)[0]
        try:
            theirs = oracle(x.clone())
        except RuntimeError:  # a view that autograd does not let be written to
            theirs = oracle(x.detach().clone())
        assert_close(mine, theirs)
        weight = torch.randn(mine.shape, dtype=torch.float64, generator=generator)
        (gradient,) = torch.autograd.grad((mine * weight).sum(), x)
        try:
            assert_close(gradient, torch.autograd.grad((theirs * weight).sum(), x)[0])
        except RuntimeError:
            step = 1e-6 * torch.randn(x.shape, dtype=torch.float64, generator=generator)
            with torch.no_grad():
                difference = ((oracle(x + step) - oracle(x - step)) * weight).sum() / 2
            assert_close((gradient * step).sum(), difference, 1e-6)


def assert_close(mine: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    assert mine.shape == theirs.shape
    assert bool(torch.isfinite(theirs).all())
    difference, scale = (float(item.detach().abs().max()) for item in (mine - theirs, theirs))
    assert difference <= tolerance * max(scale, 1e-3)


# --- ordinary networks


class Residual(nn.Module):
    """Batch norm, an in-place and a functional ReLU used twice, an addition in place."""

    def __init__(self, width: int = 6, inputs: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.first(x)))
        z = self.norm2(self.second(y))
        z += y
        z = F.relu(z)
        return self.head(F.relu(z - 0.2).mean(dim=(2, 3)))


class Pools(nn.Module):
    """Pooling of every kind, overlapping, with ceil mode and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.overlapping = nn.MaxPool2d(3, stride=2, padding=1)
        self.ceil = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.mean = nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        parts = [
            F.adaptive_avg_pool2d(self.overlapping(x), (2, 2)),
            F.adaptive_max_pool2d(self.ceil(x), (2, 2)),
            F.adaptive_avg_pool2d(self.mean(x), 2),
        ]
        return torch.cat(parts, dim=1).flatten(1)


class Flattened(nn.Module):
    """The same flattening in four spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 3) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        flat = [
            x.flatten(1),
            x.view(x.size(0), -1),
            x.reshape(x.shape[0], x.shape[1] * x.shape[2]),
            torch.flatten(x, 1),
        ]
        total = torch.zeros(x.size(0), 3, dtype=x.dtype)
        for index, layer in enumerate(self.layers):
            total = total + layer(flat[index])
        return total


class Activations(nn.Module):
    """One of each activation; several have an in-place form."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.prelu = nn.PReLU(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        y = F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.elu(x) + F.mish(x) + F.softplus(x) + F.selu(x)
        y = y + F.hardtanh(x) + F.relu6(x) + F.leaky_relu(x, 0.2) + self.prelu(x) + torch.tanh(x) + F.hardswish(x)
        y = y + (x - 1).mul_(2).sigmoid() + F.celu(x) + F.logsigmoid(x) + F.softshrink(x)
        return y + F.elu(x * 1.5, inplace=True) + F.leaky_relu(x - 1, 0.1, inplace=True)


class Attention(nn.Module):
    """Layer norm, heads by reshaping, softmax, a scaled dot product written out and the fused one."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.token = nn.Parameter(torch.rand(1, 1, width))
        self.position = nn.Parameter(torch.rand(1, 6, width))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        n, length, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(dim=-1)
        mixed = weights @ v + F.scaled_dot_product_attention(q, k, v)
        return self.out(x + mixed.transpose(1, 2).reshape(n, length, width))[:, 0]


class Tied(nn.Module):
    """One weight used three ways, and buffers, one of them not saved with the state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5, 5))
        self.again = self.weight
        self.register_buffer("scale", torch.rand(5))
        self.register_buffer("shift", torch.rand(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight) * self.scale, self.again) @ self.weight.t() + self.shift


class Upsampled(nn.Module):
    """Transposed convolution, interpolation, padding of each mode, pixel shuffle, dilated and grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1, groups=2)
        self.dilated = nn.Conv2d(4, 8, 3, dilation=2, groups=4, padding="same")
        self.reflected = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        x = self.dilated(self.up(x))
        x = F.pixel_shuffle(F.pad(x, (1, 0, 2, 1)), 2)
        x = self.reflected(F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False))
        return F.interpolate(x, size=(3, 3), mode="nearest").flatten(1)


class Sequence1d(nn.Module):
    """1-d convolutions with every kind of normalisation, and an embedding of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 5, stride=2, padding="valid", bias=False)
        self.group, self.instance, self.batch = nn.GroupNorm(2, 8), nn.InstanceNorm1d(8, affine=True), nn.BatchNorm1d(8)
        self.position = nn.Embedding(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch(self.instance(self.group(self.conv(x))))
        x = x + self.position(torch.arange(x.size(2))).t()
        return torch.cat([x.amax(2), F.max_pool1d(x, 2).mean(2), x.std(2), F.normalize(x, dim=1).sum(2)], dim=1)


class Encoder(nn.Module):
    """torch's own transformer layer, under a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.full((x.size(1), x.size(1)), float("-inf"), dtype=x.dtype), 1)
        mixed = torch.softmax(x @ x.transpose(1, 2) + mask, dim=-1) @ self.layer(x)
        return self.attention(mixed, x, x)[0].mean(1)


class Standardised(nn.Module):
    """Convolutions whose weights are standardised in the forward pass, in two spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        var, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        first = (weight - mean) / torch.sqrt(var + 1e-5)
        flat = weight.reshape(1, 4, -1)
        second = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(weight)
        return F.conv2d(x, first, bias).flatten(1) + F.conv2d(x, second).flatten(1)


class Various(nn.Module):
    """Sorting, gathering, indexing, einsum, scans, gates, similarities, sampling on a grid."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, :, :, 0]
        chosen = torch.cat([rows.topk(2, 1)[0], rows.sort(1)[0], rows.gather(1, rows.argmax(1, keepdim=True))], 1)
        index = torch.tensor([0, 2, 1])
        mixed = torch.einsum("nij,nkj->nik", rows, rows[:, index].tril())
        gated = F.glu(torch.cat([mixed, rows[:, :, :3]], dim=1)[:, :6], 1).cumsum(1)
        similar = F.cosine_similarity(rows, rows.flip(1), dim=2) + torch.logsumexp(rows, 2) + rows.norm(2, 2)
        grid = torch.linspace(-1, 1, 4, dtype=x.dtype).reshape(1, 2, 1, 2).expand(x.size(0), -1, 2, -1)
        sampled = F.grid_sample(x, grid, align_corners=False)
        picked = torch.where(x > 0, x, x.clamp(min=-0.1) * 3)[:, :, ::2].prod(3)
        return torch.cat(
            [part.flatten(1) for part in (chosen, gated, similar, sampled, picked, x.std(dim=(2, 3)))], dim=1
        )


class BasicBlock(nn.Module):
    """A block of ResNet-18."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


class ResNet18(nn.Module):
    """ResNet-18 (He 2016), its width free."""

    def __init__(self, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        blocks, inputs = [], width
        for stage in range(4):
            for block in range(2):
                blocks.append(BasicBlock(inputs, width << stage, 2 if stage and not block else 1))
                inputs = width << stage
        self.layers = nn.Sequential(*blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


# --- writing in place


class WritesThroughViews(nn.Module):
    """In-place operations on views of tensors that are read afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].mul_(3)
        y[:, 1:3] += 1
        y[:, :, 0] = x[:, :, 1]
        y.view(y.size(0), -1)[:, ::2].add_(1)
        flipped = y.transpose(1, 2)
        flipped.mul_(y.sin().transpose(1, 2))
        flipped[:, 1].clamp_(min=0)
        flat = y.flatten(1)
        flat[:, 0] = 0
        return torch.cat([y.flatten(1), flat, flipped.flatten(1)], dim=1)


class WritesInto(nn.Module):
    """Filling, copying, masking and indexing in place, into tensors that start empty."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.size(0), 4, x.size(2), dtype=x.dtype)
        out[:, 0].copy_(x[:, 0])
        out[:, 1] = x[:, 1] * 2
        out[:, 2].fill_(0.5)
        out[:, 3] += x[:, 2].exp()
        ones = torch.ones_like(x)
        ones[:, :2].zero_()
        picked = x.clone()
        picked[:, [0, 2]] = x[:, [1, 0]] * 3
        picked.masked_fill_(picked > 1, 0.25)
        a, b = picked.split([1, 2], dim=1)
        b.mul_(2)
        return torch.cat([out, ones * x, picked, a, b], dim=1).flatten(1)


class WritesToChunks(nn.Module):
    """In-place operations on what unbind, chunk, select and diagonal return, one through another."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        first, second = y.chunk(2, dim=1)
        second.add_(first)
        first.sub_(second)
        for part in y.unbind(2):
            part.mul_(1.5)
        torch.diagonal(y, dim1=1, dim2=2).add_(1)
        square = y.permute(0, 2, 1)
        square[:, 1:, :2].div_(2)
        return y.flatten(1) + square.reshape(x.size(0), -1)


# --- what only scripting keeps


class Scripted(nn.Module):
    """Loops, branches, lists, tuples, dictionaries and optional values that depend on shapes and constants."""

    limit: int

    def __init__(self) -> None:
        super().__init__()
        self.limit = 2
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def shifted(self, x: Tensor, shift: float | None = None) -> tuple[Tensor, int]:
        if shift is not None:
            x = x + shift
        return x, x.size(1)

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        named: dict[str, Tensor] = {}
        for index in range(x.size(1)):
            row = x[:, index]
            if index % 2 == 0 and x.size(2) > 3:
                row = torch.relu(row)
            elif index > self.limit:
                row = -row
            parts.append(row)
        for index, layer in enumerate(self.layers):
            named[f"layer{index}"] = layer(parts[index])
        count = 0
        while count < 2:
            parts.insert(0, parts.pop())
            count += 1
        moved, rows = self.shifted(torch.stack(parts, dim=1), 0.5)
        plain, _ = self.shifted(moved)
        assert plain.shape == moved.shape
        total = named["layer0"] + named["layer1"]
        if "layer2" in named and len(parts) == rows:
            total = total * named["layer2"]
        if x.dim() != 3:
            raise ValueError("three dimensions")
        return torch.cat([plain.flatten(1), total], dim=1)


class SizeArithmetic(nn.Module):
    """Reshapes by numbers that depend on the batch, with whole and true division."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, length = x.size(0), x.size(1), x.size(2)
        merged = x.reshape(n * c, length)
        halves = merged.reshape(n * c * 2, length // 2)
        back = halves.reshape(n, c * 2, -1)
        rows = torch.arange(n * 2, dtype=x.dtype).reshape(n, 2)
        same = x.numel() // x.size(0)
        scaled = back / (x.numel() / (n * c))
        return torch.cat([scaled.flatten(1), 0 * rows, x.view(n, same)], dim=1)


ANY_WAY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 6, 6)),
    "pools": (Pools, (2, 11, 9)),
    "flattened": (Flattened, (3, 4)),
    "activations": (Activations, (6,)),
    "attention": (Attention, (5, 8)),
    "tied": (Tied, (5,)),
    "upsampled": (Upsampled, (4, 5, 5)),
    "sequence": (Sequence1d, (4, 18)),
    "encoder": (Encoder, (5, 8)),
    "standardised": (Standardised, (4, 5, 5)),
    "various": (Various, (4, 3, 3)),
    "resnet18": (lambda: ResNet18(8, 10), (3, 24, 24)),
    "writes_through_views": (WritesThroughViews, (3, 4)),
    "writes_into": (WritesInto, (3, 4)),
    "writes_to_chunks": (WritesToChunks, (4, 4)),
    "size_arithmetic": (SizeArithmetic, (3, 4)),
}
"""Networks that can be traced, scripted and exported: how to make them, and the shape of a sample."""
