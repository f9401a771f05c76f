"""Small nets whose attributions are known, saved as TorchScript and opened as a user would; and the bundled samples."""

import math
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from grid_nets import AnyRank, TinyVit
from nets import quiet, ready
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO, cells

from attrcli import model as models
from attrcli.model import Model, Target

SAMPLES = Path(__file__).parents[2] / "sample_models"
NETS = ("fashion_mlp", "fashion_cnn")
FORMATS = (".pt", ".onnx", ".pt2")


class Linear(nn.Module):
    """f_k(x) = w_k . x + b_k."""

    def __init__(self, features: int, outputs: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class Quadratic(nn.Module):
    """f_k(x) = x A_k x / 2 + w_k . x + 0.5, A_k symmetric."""

    def __init__(self, features: int, outputs: int = 2) -> None:
        super().__init__()
        half = torch.randn(outputs, features, features)
        self.a = nn.Parameter((half + half.transpose(1, 2)) / 2)
        self.w = nn.Parameter(torch.randn(outputs, features))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return torch.einsum("ni,kij,nj->nk", flat, self.a, flat) / 2 + flat @ self.w.t() + 0.5


class Smooth(nn.Module):
    """Without kinks, blind to every third element; the third logit is 2 f - 3 g of the first two, f and g."""

    def __init__(self, channels: int = 2, height: int = 9, width: int = 13) -> None:
        super().__init__()
        shape = (channels, height, width)
        self.first = nn.Conv2d(channels, 4, 3, padding=1)
        self.second = nn.Linear(4 * height * width, 2)
        self.mix = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -3.0]]))
        self.seen = nn.Parameter((torch.arange(math.prod(shape)) % 3 > 0).reshape(shape).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x * self.seen)).flatten(1)) @ self.mix.t()


class Kinked(nn.Module):
    """Convolution, batch norm, ReLU, overlapping max pooling, residual."""

    def __init__(self, channels: int = 2, height: int = 9, width: int = 13) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(6 * ((height + 1) // 2) * ((width + 1) // 2), 3)
        nn.init.normal_(self.norm.running_mean, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.norm(self.first(x))), 3, 2, 1)
        return self.last(F.relu(h + self.second(h)).flatten(1))


class Relu(nn.Module):
    """One hidden layer of ReLUs; `offset` moves every score."""

    def __init__(self, features: int, offset: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 3))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.offset


class Constant(nn.Module):
    """The same scores for every input: through the input with zero weights, or without reading it."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads, self.c = reads, nn.Parameter(torch.tensor([3.0, -1.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1).sum(1, keepdim=True) * 0 if self.reads else torch.zeros(x.shape[0], 1)) + self.c


class Sum(nn.Module):
    """f(x) = sum of x: its gradient is one number, expanded."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)


class SmoothReluNet(Smooth):
    """As `Smooth`, with a ReLU for the methods that need one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x * self.seen)).flatten(1)) @ self.mix.t()


class OneHead(Smooth):
    """As `SmoothReluNet`, with all three logits from one layer: no unit in front of them is below zero."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.mix @ self.second.weight, self.mix @ self.second.bias
        return F.linear(F.relu(self.first(x * self.seen)).flatten(1), weight, bias)


class ReluConstant(Constant):
    """As `Constant`, behind a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x) if self.reads else x)


@dataclass(frozen=True)
class Family:
    """The nets that a method can be tested on.

    `ranks` are the shapes of samples that it takes; `any_rank` makes a net for one of them. `nets` are two for samples
    of (2, 9, 13), the first of which is blind to every third element and has a third logit 2 f - 3 g of the first two.
    `constant` makes a net whose scores are constants, reading its input or not; None where the method needs more of a
    net than one can have. `bundled` are the sample models that it works on.
    """

    ranks: tuple[tuple[int, ...], ...] = ((7,), (3, 11), (2, 5, 7), (2, 3, 4, 5))
    any_rank: Callable[[tuple[int, ...]], nn.Module] = lambda shape: Linear(math.prod(shape))
    nets: tuple[Callable[[], nn.Module], Callable[[], nn.Module]] = (Smooth, Kinked)
    constant: Callable[[bool], nn.Module] | None = Constant
    bundled: tuple[str, ...] = NETS


ANY = Family()
RELU = Family(any_rank=lambda shape: Relu(math.prod(shape)), nets=(SmoothReluNet, Kinked), constant=ReluConstant)

GUIDED = replace(RELU, constant=lambda reads: ReluConstant(True))  # one that does not read its input has no ReLU
GRID = Family(
    ranks=((3, 11), (2, 5, 7), (2, 3, 4, 5)),
    any_rank=AnyRank,
    nets=RELU.nets,
    constant=None,
    bundled=("fashion_cnn",),
)
EXCITED = replace(GRID, nets=(OneHead, Kinked))
ATTENTION = Family(
    ranks=((3, 11), (2, 7, 13), (2, 4, 6, 5)),
    any_rank=TinyVit,
    nets=(TinyVit, lambda: TinyVit(how="merged", tokens=0)),
    constant=None,
    bundled=(),
)

FAMILIES: dict[str, Family] = {
    "attention_rollout": ATTENTION,
    "deconvnet": GUIDED,
    "excitation_backprop": EXCITED,
    "grad_cam": GRID,
    "grad_cam_pp": GRID,
    "guided_backprop": GUIDED,
    "guided_grad_cam": GRID,
    "layer_cam": GRID,
    "prune_grad": RELU,
    "prune_int": RELU,
}
"""The family of each method that does not work on any net."""


def family(method: str) -> Family:
    """The nets that a method can be tested on."""
    return FAMILIES.get(method, ANY)


def open_net(net: nn.Module, folder: Path, shape: tuple[int, ...], *, precision: str = "float64") -> Model:
    """Trace a net at one sample shape, save it, and load the file."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    net = net.to(dtype).eval().requires_grad_(False)
    path = folder / f"{type(net).__name__}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(net, torch.randn(2, *shape, dtype=dtype)), path)
    return models.load(path, precision=precision)


def target(*index: int, seeded: bool = True) -> Target:
    """A target per row; the seed of a row depends on its place unless there is none."""
    chosen = torch.tensor(index)
    return Target(chosen, seed=torch.arange(len(index)) + 11 if seeded else None)


def batch(count: int, *shape: int, seed: int = 0) -> Tensor:
    """`count` random samples, float64."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def away(values: Tensor, expected: Tensor) -> float:
    """Largest difference in a batch, relative to each sample's largest expected value."""
    values, expected = values.double().flatten(1), expected.double().flatten(1)
    return float(((values - expected).abs().amax(1) / expected.abs().amax(1).clamp_min(1e-300)).max())


# -- bundled samples -----------------------------------------------------------------------------------------------


@cache
def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """All test images and the black baseline, (60, 1, 28, 28), prepared as the sidecar says; classes take turns."""
    sidecar = tomllib.loads((SAMPLES / "fashion_cnn.toml").read_text())["input"]
    paths = sorted((SAMPLES / "images" / "test").rglob("*.png"), key=lambda path: (path.stem, path))
    pixels = np.stack([np.asarray(Image.open(path), np.float32) for path in paths])[:, None] / np.float32(255)
    mean, std = np.float32(sidecar["mean"][0]), np.float32(sidecar["std"][0])
    normal = torch.from_numpy((pixels - mean) / std).to(dtype)
    return normal, torch.full_like(normal, float((0 - mean) / std))


def without_ties(x: Tensor) -> Tensor:
    """A trace of noise on images, in float64.

    In flat regions neighbouring patches are equal, and with them the values that a max pool chooses from: the winner,
    and so the gradient, is then whichever rounding makes larger, in any precision. Noise makes the winner a matter of
    the image.
    """
    return x + 1e-2 * batch(len(x), *x.shape[1:], seed=5).to(x)


@cache
def script(net: str, dtype: torch.dtype = torch.float32) -> torch.jit.ScriptModule:
    """A bundled net as torch runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(SAMPLES / f"{net}.pt").to(dtype).eval()


@cache
def sample(net: str, suffix: str = ".pt", precision: str = "float32") -> Model:
    """A bundled net as attrcli runs it."""
    model = models.load(SAMPLES / f"{net}{suffix}", precision=precision)
    model.rows = 64
    return model


@cache
def predicted(net: str) -> Tensor:
    """The class of each test image, (60,)."""
    with torch.no_grad():
        return script(net)(images()[0]).argmax(1)


# -- the zoo -------------------------------------------------------------------------------------------------------

FOLDER = TemporaryDirectory()


@cache
def architecture(name: str, precision: str = "float64") -> tuple[Model, Tensor, Target]:
    """A traced architecture of the zoo, opened once for all tests: the model, three samples, a class of each."""
    arch, path = ZOO[name], Path(FOLDER.name) / f"{name}.pt"
    torch.manual_seed(0)
    module, given = ready(arch.make()), cells.inputs(arch, 3, torch.float64)
    with quiet():
        torch.jit.save(torch.jit.trace(module, given, check_trace=False), path)
    model = models.load(path, precision=precision)
    first, *others = arch.inputs
    fixed = {n: g[0] for n, g in zip(others, given[1:], strict=True)}
    model.bind(input=first, fixed=fixed, output="output_0" if name in ("siamese", "translator") else None)
    x = given[0].to(model.dtype)
    logits = model.logits(x)
    return model, x, Target(torch.arange(3) % (logits.shape[1] if logits.dim() > 1 else 1))
