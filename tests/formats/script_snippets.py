"""What people write in scripted models, feature by feature: each takes (N, 3, 4)."""

import math
from collections import OrderedDict
from enum import Enum
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Found(NamedTuple):
    """A result with names."""

    score: Tensor
    rows: int


class Mode(Enum):
    """A choice among constants."""

    SUM = 1
    MEAN = 2


class Comprehensions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = [row * (i + 1) for i, row in enumerate(x.unbind(1))]
        sizes = [size for size in x.shape[1:]]  # noqa: C416
        named = {f"row{i}": row for i, row in enumerate(rows)}
        return torch.stack([named["row2"], *rows[:1]] if False else [named["row2"], rows[0]], 1) * sum(sizes)


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x[:, 0])
        for i in range(x.size(1) - 1, -1, -1):
            if i == 1:
                continue
            for j in range(5):
                if j > i:
                    break
                total = total + x[:, i] * (j + 1)
        i = 0
        while True:
            i += 1
            if i >= 3:
                break
        return total * i


class EarlyReturns(nn.Module):
    def scaled(self, x: Tensor, times: int) -> Tensor:
        if times > 2:
            return x * times
        for i in range(3):
            if i == times:
                return x + i
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, x.size(1)) + self.scaled(x, 1) + self.scaled(x, -1)


class Lists(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        parts.append(x[:, 0])
        parts.extend([x[:, 1], x[:, 2]])
        parts.insert(1, x[:, 0] * 2)
        last = parts.pop()
        parts.reverse()
        numbers = [3, 1, 2]
        numbers.sort()
        numbers += [5]
        numbers[0] = numbers[-1] * 2
        order = sorted(numbers)[::-1]
        assert numbers.index(3) == 2 and numbers.count(3) == 1 and 7 not in numbers  # noqa: PT018
        pieces = (parts + [last] * 2)[::2]
        return torch.stack(pieces, dim=1) * float(order[0] + len(pieces) + max(numbers) - min(numbers))


class Dictionaries(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {"a": x, "b": x * 2}
        held["c"] = held["a"] + held.pop("b")
        total = torch.zeros_like(x)
        for key, value in held.items():
            if key != "a" and key in held:
                total = total + value
        count: dict[int, int] = {1: 2}
        count.update({3: 4})
        return {"out": total * count.get(3, 0) * len(held), "other": held["a"]}


class Tuples(nn.Module):
    def both(self, x: Tensor) -> tuple[Tensor, tuple[int, float]]:
        return x.sin(), (x.size(1), 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Found]:
        y, (rows, half) = self.both(x)
        found = Found(score=y * half, rows=rows)
        first = (x, y, x + y)[0:2]
        return found.score + first[1] + found[0], found


class Optionals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.skip: Optional[nn.Module] = None  # noqa: UP045
        self.layer: Optional[nn.Linear] = nn.Linear(4, 4)  # noqa: UP045
        self.scale: Optional[float] = None  # noqa: UP045

    def masked(self, x: Tensor, mask: Optional[Tensor] = None, times: Optional[int] = 3) -> Tensor:  # noqa: UP045
        if mask is None:
            mask = x > 0
        if times is not None:
            x = x * times
        return torch.where(mask, x, x * 0.1)

    def forward(self, x: Tensor, extra: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        layer = self.layer
        if self.skip is None and layer is not None:
            x = layer(x)
        scale = self.scale if self.scale is not None else 2.0
        return self.masked(x) * scale + self.masked(x, x < 0, None) + (torch.zeros_like(x) if extra is None else extra)


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        _, c, length = x.shape
        half = int(length / 2) + length // 3 + round(length * 0.4) + abs(-c) % 3
        scale = math.sqrt(c) * math.exp(-1.0) + math.log(c + 1) + math.pi + float("0.5") + math.pow(2.0, c) + 2**c
        scale += math.ceil(1.2) + math.floor(-1.2) + math.cos(0.5) + math.tanh(0.1) + (7 ^ 2) + (6 & 3) + (1 << 2)
        big = c if c > 2 and not length < 1 else -c
        inf = float("inf")
        return (x * scale + half).clamp(max=1000.0 if scale < inf else 0.0) * big / math.gcd(12, 8) - divmod(7, 2)[1]


class SizesAsTensors(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        count = torch.tensor(x.size(1)) * 2 + x.shape[2]
        grid = torch.arange(x.size(1), dtype=x.dtype, device=x.device).view(1, -1, 1) / torch.tensor(
            [x.size(1)], dtype=x.dtype
        )
        return x * count + grid + torch.full([x.size(0), 1, 1], 0.5, dtype=x.dtype) + x.new_ones(x.size(0), 3, 1)


class Texts(nn.Module):
    mode: str

    def __init__(self) -> None:
        super().__init__()
        self.mode = "relu-leaky"

    def forward(self, x: Tensor) -> Tensor:
        name, _, how = self.mode.partition("-")
        if name.upper() == "RELU" and self.mode.startswith("re") and len(self.mode.split("-")) == 2:
            x = F.leaky_relu(x, 0.1) if how == "leaky" else F.relu(x)
        assert x.dim() == 3, f"three dimensions, not {x.dim()}"
        return x


class Methods(nn.Module):
    """Methods that call each other, ones for others to call, ones that TorchScript leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(OrderedDict(first=nn.Linear(4, 4), second=nn.Linear(4, 4)))
        self.bank = nn.ParameterList([nn.Parameter(torch.rand(4)) for _ in range(2)])

    @torch.jit.export
    def embed(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x

    @torch.jit.unused
    def plot(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, show: bool = False) -> Tensor:
        if show:
            return self.plot(x)
        y = self.embed(x)
        for weight in self.bank:
            y = y * weight
        return y


class Constants(nn.Module):
    """Attributes of every kind: numbers, lists, dictionaries, tensors in containers, an enumeration."""

    sizes: list[int]
    table: dict[str, int]
    weights: list[Tensor]
    named: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.table = [3, 4], {"a": 2}
        self.weights = [torch.rand(4, dtype=torch.float64) for _ in range(2)]
        self.named = {"shift": torch.rand(4, dtype=torch.float64)}
        self.mode = Mode.MEAN

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x * weight
        x = x + self.named["shift"] * self.table["a"] * self.sizes[-1]
        return x.mean(1) if self.mode == Mode.MEAN else x.sum(1)


class Indices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        columns = torch.tensor([0, 2])
        y = x[:, columns, 1:] + x[:, [1, 0]][..., :3] + x[:, -2:, ::2][:, :, :1] + x[:, None, 0, :3]
        y[:, 0] = x[:, 1, 1:]
        y[:, 1, -1] += 2.0
        y[..., 0][y[..., 0] > 0.5] = 0.25
        return y * x[:, torch.arange(2), torch.arange(2)].unsqueeze(-1)


class Annotated(nn.Module):
    def pick(self, value: Any) -> int:
        if isinstance(value, int):
            return value
        if isinstance(value, Tensor):
            return value.dim()
        return 0

    def forward(self, x: Tensor) -> Tensor:
        empty = torch.jit.annotate(list[int], [])
        empty.append(self.pick(2))
        return x * (self.pick(x) + empty[0] + self.pick("text"))


class Asks(nn.Module):
    """What models ask of their tensors, and of torch."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() and x.is_cuda:
            x = x.cuda()
        if x.dtype == torch.float16 or not x.is_floating_point() or x.is_sparse or x.is_quantized:
            x = x.float()
        if x.ndim == 3 and x.numel() > 0 and x.stride(-1) >= 0 and not x.requires_grad:
            x = x * 1.0
        if x.device.type == "cpu" and not torch.is_autocast_enabled() and x.shape[-1] == x.size(dim=2):
            x = x.contiguous().to(x.device, x.dtype, non_blocking=True)
        return x.type_as(x) if x.is_contiguous() else x


class ListOfModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for i, (block, norm) in enumerate(zip(self.blocks, self.norms)):  # noqa: B905
            x = norm(block(x)) + x
            if i % 2 == 0:
                found.append(x)
        return found[::-1]


SNIPPETS = {
    kind.__name__: kind
    for kind in (
        Comprehensions, Loops, EarlyReturns, Lists, Dictionaries, Tuples, Optionals, Numbers, SizesAsTensors, Texts,
        Methods, Constants, Indices, Annotated, Asks, ListOfModules,
    )
}  # fmt: skip
