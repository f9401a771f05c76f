"""DeepLIFT: differences add up for every op alone and for every architecture; equal to others where they are right."""

import math
import tempfile
import warnings
from functools import cache
from pathlib import Path

import captum.attr
import pytest
import torch
import zoo
from method_nets import NETS, Relu, architecture, away, batch, images, open_net, predicted, sample, target
from nets import save_traced
from torch import Tensor, nn
from torch.nn import functional as F

from attrcli import methods
from attrcli import model as models
from attrcli.errors import InputError, UnsupportedOp, UsageError
from attrcli.model import Target

DEEPLIFT = methods.load("deeplift")
EXACT = 1e-9


class Made(nn.Module):
    """A function of x between linear maps of its own, so that what the rule passes on is told apart from its input."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 6, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        made = self.function(x @ self.weight)
        flat = made.flatten(1)
        return flat @ torch.stack([torch.linspace(-1, 1, flat.shape[1]), torch.linspace(1, 3, flat.shape[1])], 1).to(
            x.dtype
        )


def opened(function, tmp_path, *shape, dtype="float64"):
    path = save_traced(Made(function).double().eval(), shape or (4, 6), tmp_path / "net.pt")
    return models.load(path, precision=dtype)


def gap(model, x: Tensor, to: Target, baseline: Tensor, method=DEEPLIFT) -> float:
    """|sum + remainder - delta|, of the sum of |contribution|, beyond the rounding of the scores themselves."""
    result = method.attribute(model, x, to, baseline)
    score, reference = model.scores(x, to), model.scores(baseline, to)
    missed = (result.values.double().flatten(1).sum(1) + result.remainder - (score - reference)).abs()
    rounding = 1e-13 * (1 + score.abs() + reference.abs())
    return float(
        ((missed - rounding).clamp_min(0) / result.values.double().abs().flatten(1).sum(1).clamp_min(1e-300)).max()
    )


def points(*shape, seed=0, dtype=torch.float64) -> Tensor:
    return torch.randn(3, *(shape or (4, 6)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


POSITIVE = F.softplus
SIZES = ((6, [6]), (2, [2]), (1, []), (1, []))
CELL = {
    gates: [torch.linspace(-1, 1, gates * 2 * size).cos().double().reshape(gates * 2, *shape) for size, shape in SIZES]
    for gates in (1, 3, 4)
}

ALONE = {
    "relu": F.relu, "leaky": lambda z: F.leaky_relu(z, 0.1), "elu": F.elu, "selu": F.selu, "celu": F.celu,
    "relu6": F.relu6, "hardtanh": F.hardtanh, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "clamp": lambda z: z.clamp(-0.4, 0.7), "abs": torch.abs, "softshrink": F.softshrink, "hardshrink": F.hardshrink,
    "threshold": lambda z: F.threshold(z, 0.2, -1.0), "prelu": lambda z: F.prelu(z, torch.tensor([0.3]).double()),
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu, "gelu tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu, "mish": F.mish, "softplus": F.softplus, "logsigmoid": F.logsigmoid, "erf": torch.erf,
    "exp": torch.exp, "expm1": torch.expm1, "log": lambda z: POSITIVE(z).log(), "log1p": lambda z: POSITIVE(z).log1p(),
    "sqrt": lambda z: POSITIVE(z).sqrt(), "rsqrt": lambda z: POSITIVE(z).rsqrt(), "sin": torch.sin, "cos": torch.cos,
    "reciprocal": lambda z: 1 / POSITIVE(z), "square": torch.square, "cube": lambda z: z**3, "power": lambda z: z**4,
    "root": lambda z: POSITIVE(z) ** 0.5, "exponential": lambda z: 2.0**z, "atan": torch.atan,
    "product": lambda z: z * z.roll(1, 2), "itself": lambda z: z * z, "broadcast": lambda z: z * z[:, :, :1],
    "quotient": lambda z: z / POSITIVE(z.roll(1, 2)), "over": lambda z: 3 / POSITIVE(z),
    "matmul": lambda z: z @ z.transpose(1, 2), "matrix vector": lambda z: z @ z[:, 0, :, None],
    "einsum": lambda z: torch.einsum("nij,nkj->nik", z, z.cos()), "outer": lambda z: z[:, :, :1] @ z[:, :1],
    "maximum": lambda z: torch.maximum(z, z.roll(1, 2)), "minimum": lambda z: torch.minimum(z, -z.roll(1, 1)),
    "atan2": lambda z: torch.atan2(z, POSITIVE(z.roll(1, 2))),
    "power of two": lambda z: torch.pow(POSITIVE(z), z.roll(1, 2)),
    "amax": lambda z: z.amax((1, 2), keepdim=True), "amin": lambda z: z.amin(1), "max": lambda z: z.max(2)[0],
    "min": lambda z: z.min(1, keepdim=True)[0], "max pool 1d": lambda z: F.max_pool1d(z, 3, 1, 1),
    "max pool": lambda z: F.max_pool2d(z, 2), "overlapping": lambda z: F.max_pool2d(z, 3, 1, 1),
    "ceil mode": lambda z: F.max_pool2d(z, 3, 2, ceil_mode=True), "after relu": lambda z: F.max_pool2d(z.relu(), 2),
    "dilated": lambda z: F.max_pool2d(z, 2, 1, dilation=2), "adaptive max": lambda z: F.adaptive_max_pool2d(z, (2, 4)),
    "softmax": lambda z: z.softmax(2), "softmax over rows": lambda z: z.softmax(1),
    "steep": lambda z: (99 * z).softmax(2),
    "log softmax": lambda z: z.log_softmax(2), "logsumexp": lambda z: z.logsumexp((1, 2), keepdim=True),
    "masked softmax": lambda z: z.masked_fill(torch.eye(4, 6) > 0, -math.inf).softmax(2),
    "layer norm": lambda z: F.layer_norm(z, (4, 6)), "rms norm": lambda z: F.rms_norm(z, (6,)),
    "group norm": lambda z: F.group_norm(z, 2), "instance norm": F.instance_norm, "var": lambda z: z.var(2),
    "std": lambda z: z.std((1, 2), unbiased=False, keepdim=True), "norm": lambda z: z / z.norm(dim=2, keepdim=True),
    "norm 1": lambda z: z.norm(1, dim=2), "attention": lambda z: F.scaled_dot_product_attention(z, z.sin(), z.cos()),
    "causal": lambda z: F.scaled_dot_product_attention(z, z.sin(), z.cos(), is_causal=True),
    "where": lambda z: torch.where(z > 0.1, z.sin(), z.cos()), "mask": lambda z: z * (z > 0.1),
    "masked fill": lambda z: z.masked_fill(z > 0.5, 2.0), "round": lambda z: (3 * z).round() + z,
    "topk": lambda z: z.topk(2, 2)[0], "sort": lambda z: z.sort(1)[0] * torch.arange(4.0)[:, None],
    "detach": lambda z: z * z.detach().sigmoid(), "cat": lambda z: torch.cat([z.relu(), -z], 1),
    "lstm cell": lambda z: torch.lstm_cell(z[:, 0], (z[:, 1, :2], z[:, 2, :2]), *CELL[4])[1],
    "gru cell": lambda z: torch.gru_cell(z[:, 0], z[:, 1, :2], *CELL[3]),
    "relu cell": lambda z: torch.rnn_relu_cell(z[:, 0], z[:, 1, :2], *CELL[1]) + z[:, 0, :2],
    "lerp": lambda z: torch.lerp(z, z.sin(), z.sigmoid()), "addcmul": lambda z: torch.addcmul(z, z.sin(), z.cos()),
    "addcdiv": lambda z: torch.addcdiv(z, z.sin(), POSITIVE(z)), "cumsum": lambda z: z.relu().cumsum(2),
}  # fmt: skip
SPATIAL = ("max pool", "overlapping", "ceil mode", "after relu", "dilated", "adaptive max")


FOLDER = tempfile.TemporaryDirectory()


@cache
def alone(name):
    """An op of `ALONE` in a net, opened once for all tests, and the shape of its samples."""
    shape = (1, 5, 6) if name in SPATIAL else (4, 6)
    return opened(ALONE[name], Path(tempfile.mkdtemp(dir=FOLDER.name)), *shape), shape


@pytest.mark.parametrize("name", ALONE)
def test_differences_add_up_for_every_op_alone(name):
    model, shape = alone(name)
    x, near = points(*shape), points(*shape, seed=1)
    near[0, :, 1:] = x[0, :, 1:] + 1e-9
    for baseline in (points(*shape, seed=1), 0.1 * points(*shape, seed=2)[:1].expand_as(x), near, x * (x > 0)):
        assert gap(model, x, target(0, 1, 0), baseline) < EXACT
    same = DEEPLIFT.attribute(model, x, target(0, 1, 0), x)
    assert not same.values.any()
    assert not same.remainder.any()


def test_only_what_is_decided_by_comparing_is_remainder():
    x, baseline = points(), points(seed=1)
    decided = {"where", "mask", "masked fill", "round", "topk", "sort", "detach"}
    for name in ALONE:
        if name in SPATIAL:
            continue
        remainder = DEEPLIFT.attribute(alone(name)[0], x, target(0, 1, 0), baseline).remainder
        assert bool(remainder.abs().max() > 1e-3) == (name in decided), name


ARCHITECTURES = [
    name
    for name, arch in zoo.ZOO.items()
    if not next(iter(arch.inputs.values())).words and name != "deeplab"  # whose dictionaries torch does not trace
]


def baselines(x):
    return torch.zeros_like(x), points(*x.shape[1:], seed=9, dtype=x.dtype)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_differences_add_up_for_every_architecture(name):
    model, x, to = architecture(name)
    for baseline in baselines(x):
        assert gap(model, x, to, baseline) < EXACT


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i % 3 else ()) for i, name in enumerate(ARCHITECTURES)]
)
def test_differences_add_up_to_rounding_in_float32(name):
    model, x, to = architecture(name, "float32")
    for baseline in baselines(x):
        if name == "big_transfer" and not baseline.any():
            with pytest.raises(InputError, match=r"group_norm.*nearly vanishes at the baseline"):
                DEEPLIFT.attribute(model, x, to, baseline)
            continue
        result = DEEPLIFT.attribute(model, x, to, baseline)
        delta = model.scores(x, to) - model.scores(baseline, to)
        missed = (result.values.double().flatten(1).sum(1) + result.remainder - delta).abs()
        size = result.values.double().abs().flatten(1).sum(1)
        assert bool((missed <= 1e-3 * delta.abs() + 1e-6 * size).all())


# -- closed forms


class Least(nn.Module):
    """i1 - relu(i1 - i2) = min(i1, i2)."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, 0] - torch.relu(x[:, 0] - x[:, 1]))[:, None]


def test_the_worked_example(tmp_path):
    model = open_net(Least(), tmp_path, (2,))
    x = torch.tensor([[5.0, 2.0]]).double()
    values = DEEPLIFT.attribute(model, x, target(0), torch.zeros_like(x)).values
    assert values.tolist() == [[0, 2]]


def test_without_biases_and_from_zero_it_is_gradient_times_input(tmp_path):
    torch.manual_seed(0)
    net = Relu(10)
    for layer in (net.layers[1], net.layers[3]):
        nn.init.zeros_(layer.bias)
    model, x, to = open_net(net, tmp_path, (10,)), batch(5, 10), target(0, 1, 2, 0, 1)
    expected = methods.load("input_x_gradient").attribute(model, x, to, None).values
    assert away(DEEPLIFT.attribute(model, x, to, torch.zeros_like(x)).values, expected) < 1e-12


def test_the_maximum_of_a_window_goes_to_both_winners(tmp_path):
    class Window(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool1d(x[:, None], 3)[:, 0]

    model = open_net(Window(), tmp_path, (3,))
    x, baseline = torch.tensor([[5.0, 1.0, 2.0]]).double(), torch.tensor([[0.0, 3.0, 1.0]]).double()
    # y = 5, y0 = 3, top = 5: the winner at x is given 5 - 3, that at the baseline 5 - 5
    assert DEEPLIFT.attribute(model, x, target(0), baseline).values.tolist() == [[2, 0, 0]]
    assert DEEPLIFT.attribute(model, baseline, target(0), x).values.tolist() == [[-2, 0, 0]]


@pytest.mark.parametrize("rounding", [0, 1e-15])
@pytest.mark.parametrize("f", [lambda z: F.max_pool1d(z[:, None], 3)[:, 0], lambda z: z.amax(1, True)])
def test_where_the_baseline_ties_all_goes_to_the_winner_at_the_input(f, rounding, tmp_path):
    class Window(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    x, baseline = torch.tensor([[-4.0, -2.0, -3.0], [1.0, 2.0, 5.0]]).double(), torch.ones(2, 3).double()
    baseline[:, 0] += rounding
    values = DEEPLIFT.attribute(open_net(Window(), tmp_path, (3,)), x, target(0, 0), baseline).values
    assert away(values, torch.tensor([[0.0, -3.0, 0.0], [0.0, 0.0, 4.0]])) < 1e-14


def test_what_has_of_a_value_its_size_alone_is_a_constant(tmp_path):
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, 2)
            return (rows * torch.full_like(rows, 3.0)).reshape(x.shape[0], 4)

    x, baseline = batch(3, 4), batch(3, 4).flip(0)
    found = DEEPLIFT.attribute(open_net(Scaled(), tmp_path, (4,)), x, target(1, 1, 1), baseline)
    assert away(found.values, 3 * (x - baseline) * torch.eye(4).double()[1]) < 1e-14
    assert found.remainder.abs().max() == 0


def test_a_multiplier_times_the_difference_is_the_contribution(tmp_path):
    model, x = sample("fashion_cnn", precision="float64"), images(torch.float64)[0][:4]
    to, baseline = target(*predicted("fashion_cnn")[:4].tolist()), torch.full_like(x, 0.3)
    multipliers = methods.load("deeplift", {"output": "multiplier"}).attribute(model, x, to, baseline).values
    assert "complete" not in methods.load("deeplift", {"output": "multiplier"}).axioms
    assert "complete" in DEEPLIFT.axioms
    assert away(multipliers * (x - baseline), DEEPLIFT.attribute(model, x, to, baseline).values) < 1e-12


@pytest.mark.parametrize("net", NETS)
def test_one_baseline_for_all_and_a_row_for_each_are_the_same(net, monkeypatch):
    model, x = sample(net, precision="float64"), images(torch.float64)[0][:6]
    to, baseline = target(*predicted(net)[:6].tolist()), torch.full_like(x, 0.2)
    shared = DEEPLIFT.attribute(model, x, to, baseline).values
    monkeypatch.setattr(type(model), "broadcasts", lambda *_: False)
    assert away(DEEPLIFT.attribute(model, x, to, baseline).values, shared) < 1e-12


# -- against Captum where it is right


class Plain(nn.Module):
    """Each activation a module of its own, windows that do not overlap, linear layers around them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 16), nn.Sigmoid(), nn.Linear(16, 9), nn.Tanh(),
            nn.Linear(9, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_equals_captum_where_captum_is_right(tmp_path):
    torch.manual_seed(1)
    net, x, index = Plain().double().eval(), batch(8, 1, 28, 28), torch.arange(8) % 5
    baseline = batch(8, 1, 28, 28).flip(0)  # without ties in a window, which rounding would decide
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.attr.DeepLift(net).attribute(x, baseline, target=index)
    values = DEEPLIFT.attribute(open_net(net, tmp_path, (1, 28, 28)), x, Target(index), baseline).values
    assert away(values, theirs.detach()) < 1e-6


# -- what is refused


def test_scores_that_do_not_add_up_are_refused():
    model, x = sample("fashion_mlp"), images()[0][:1]
    with pytest.raises(UsageError, match=r"deeplift explains logits.*--score prob"):
        DEEPLIFT.attribute(model, x, Target(torch.tensor([0]), "prob"), torch.zeros_like(x))


def test_an_op_without_a_rule_is_refused_by_name(tmp_path):
    model = opened(lambda z: z.logcumsumexp(2), tmp_path)
    with pytest.raises(UnsupportedOp, match=r"net\.pt: node 'logcumsumexp' is op aten.*deeplift has no rule"):
        DEEPLIFT.attribute(model, points(), target(0, 1, 0), points(seed=1))


def test_a_norm_of_almost_nothing_at_the_baseline_is_refused_by_name(tmp_path):
    model = opened(lambda z: z / (z.norm(dim=2, keepdim=True) + 1e-12), tmp_path)
    with pytest.raises(InputError, match=r"node 'div' .*nearly vanishes at the baseline"):
        DEEPLIFT.attribute(model, points(), target(0, 1, 0), torch.zeros(3, 4, 6).double())
