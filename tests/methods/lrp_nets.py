"""Nets for the tests of LRP, and what they measure."""

from nets import save_traced
from torch import Tensor, nn
from torch.nn import functional as F

from attrcli import methods
from attrcli import model as models
from attrcli.model import Target

EXACT = 1e-10
TINY = {"composite": "epsilon", "epsilon": 1e-13}
"""LRP-0, to rounding."""


def lrp(model, x: Tensor, to: Target, **options):
    return methods.load("lrp", options).attribute(model, x, to, None)


def gap(model, result, x: Tensor, to: Target) -> float:
    """|sum + remainder - score|, of the sum of |relevance| and the score."""
    score = model.scores(x, to)
    missed = (result.values.double().flatten(1).sum(1) + result.remainder - score).abs()
    return float((missed / (score.abs() + result.values.double().abs().flatten(1).sum(1))).max())


def gradient_times_input(model, x: Tensor, to: Target) -> Tensor:
    return methods.load("input_x_gradient").attribute(model, x, to, None).values


def quietly(net: nn.Module, folder, *shape: int):
    """Opened as `open_net` does, for layers whose trace warns of sizes that it bakes in."""
    return models.load(save_traced(net.double().eval(), shape, folder / "net.pt"), precision="float64")


def chain(padded: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.Conv2d(5, 6, 3, groups=1), nn.ReLU(), nn.AvgPool2d(2, 1, padding=1 if padded else 0),
        nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """Biases, batch norm folded and not, residuals, overlapping windows with ceil mode, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.before, self.second = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(6 * 3 * 4, 3)
        for norm in (self.norm, self.before):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm(self.first(x)), 0.1)
        h = h + self.second(F.relu(self.before(h)))
        h = F.max_pool2d(F.relu(h), 3, 2, ceil_mode=True)
        return self.last(F.avg_pool2d(h, 2, 1, 0).flatten(1))
