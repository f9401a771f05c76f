"""What other implementations of DeepLIFT get wrong: each row of the list is a net here; and random graphs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_nets import away, batch, open_net, target
from nets import save_traced
from test_deeplift import DEEPLIFT, EXACT, gap, opened, points
from test_deeplift_cancel import DEEPLIFT as RULED
from torch import Tensor, nn
from torch.nn import functional as F

from attrcli import model as models

POOLED = nn.MaxPool1d(2)
REUSED = nn.ReLU()

DEFECTS = {
    "a module used twice": lambda z: REUSED(REUSED(z) - 0.3),
    "a fresh module at each call": lambda z: nn.ReLU()(z) - nn.Sigmoid()(z),
    "functional calls": lambda z: F.relu(z) + torch.tanh(z) * torch.sigmoid(z),
    "gelu, silu, exp and products": lambda z: F.gelu(z) * F.silu(z) + z.exp() * z,
    "layer norm and log softmax": lambda z: F.layer_norm(z, (6,)).log_softmax(2),
    "a softmax over the batch's mean": lambda z: (3 * z).softmax(1),
    "overlapping pools": lambda z: F.max_pool1d(z, 3, 1),
    "a ceil mode pool": lambda z: F.max_pool1d(z, 4, 3, ceil_mode=True),
    "a ReLU right before a pool": lambda z: F.max_pool1d(z.relu(), 2),
    "a pool used twice": lambda z: POOLED(POOLED(z)[:, :, :2].repeat(1, 1, 2) + 0.1),
    "a ReLU in place": lambda z: (z - 0.1).relu_() * 2,
    "a pool's output itself": lambda z: POOLED(z),
    "transformer blocks": lambda z: F.scaled_dot_product_attention(F.layer_norm(z, (6,)), z, z) + F.gelu(z),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULED)
@pytest.mark.parametrize("name", DEFECTS)
def test_a_known_defect_is_none_here(name, rule, tmp_path):
    model, x = opened(DEFECTS[name], tmp_path), points()
    near = x + 1e-12 * points(seed=3)
    for baseline in (points(seed=1), torch.zeros_like(x), near):
        assert gap(model, x, target(0, 1, 0), baseline, RULED[rule]) < EXACT


@pytest.mark.parametrize("name", ["a softmax over the batch's mean", "overlapping pools", "a ReLU right before a pool"])
def test_no_row_takes_part_in_anothers(name, tmp_path):
    model, x, baseline = opened(DEFECTS[name], tmp_path), points(), points(seed=1)
    whole = DEEPLIFT.attribute(model, x, target(0, 1, 0), baseline).values
    for i in range(3):
        alone = DEEPLIFT.attribute(model, x[i : i + 1], target([0, 1, 0][i]), baseline[i : i + 1]).values
        assert away(alone, whole[i : i + 1]) < 1e-12


class Recurrent(nn.Module):
    """An LSTM, whose cells are used again at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(3, 5, 2, batch_first=True, bidirectional=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0][:, -1])


def test_an_lstm_is_complete(tmp_path):
    torch.manual_seed(0)
    path = save_traced(Recurrent().double().eval(), (4, 3), tmp_path / "lstm.pt")
    model, x = models.load(path, precision="float64"), batch(3, 4, 3)
    assert gap(model, x, target(0, 1, 2), batch(3, 4, 3, seed=1)) < EXACT


# -- invariants


def test_adding_nothing_changes_nothing(tmp_path):
    plain = {"relu": lambda z: F.relu(z).cumsum(2), "gelu": lambda z: F.gelu(z)}
    same = {
        "relu": lambda z: F.relu(z * 1.0 + 0.0).cumsum(2),
        "gelu": lambda z: F.gelu(z / 2 + z / 2),
    }
    for name in plain:
        values = [
            DEEPLIFT.attribute(opened(f[name], tmp_path), points(), target(0, 1, 0), points(seed=1)).values
            for f in (plain, same)
        ]
        assert away(values[1], values[0]) < 1e-12


@pytest.mark.parametrize("f", [torch.sigmoid, torch.tanh, F.relu, F.softplus, torch.atan])
def test_the_multiplier_of_a_monotone_unit_lies_among_its_slopes(f, tmp_path):
    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * f(x)  # what ends in a sigmoid alone would be explained at its logit

    x, r = 3 * batch(64, 1), 3 * batch(64, 1, seed=1)
    m = DEEPLIFT.attribute(open_net(Unit(), tmp_path, (1,)), x, target(*[0] * 64), r).multipliers / 2
    line = (r + torch.linspace(0, 1, 401, dtype=torch.float64) * (x - r)).requires_grad_(True)
    (slopes,) = torch.autograd.grad(f(line).sum(), line)
    assert bool((m >= slopes.amin(1, True) - 1e-3).all())
    assert bool((m <= slopes.amax(1, True) + 1e-3).all())


@pytest.mark.parametrize("rule", RULED)
def test_where_nothing_differs_multipliers_are_the_gradient(rule, tmp_path):
    functions = [F.gelu, torch.sigmoid, lambda z: F.max_pool1d(z, 2), lambda z: z.softmax(2), lambda z: z * z.sin()]
    for f in (*functions, lambda z: torch.maximum(z, z.roll(1, 2)), lambda z: z.norm(dim=2), lambda z: z.prod(2)):
        model, x = opened(f, tmp_path), points()
        result = RULED[rule].attribute(model, x, target(0, 1, 0), x)
        assert not result.values.any()
        assert away(result.multipliers, model.gradient(x, target(0, 1, 0))[0]) < 1e-10


# -- random graphs

UNARY = {
    "relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "abs": torch.abs, "silu": F.silu,
    "softmax": lambda z: z.softmax(-1), "norm": lambda z: F.layer_norm(z, (6,)), "leaky": F.leaky_relu,
    "pool": lambda z: F.max_pool1d(z, 3, 1, 1), "mean": lambda z: F.avg_pool1d(z, 3, 1, 1), "half": lambda z: z * -0.5,
}  # fmt: skip
BINARY = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "max": torch.maximum, "where": None}


class Random(nn.Module):
    """Ops drawn one after another, each of values that are there already."""

    def __init__(self, plan: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.plan = plan
        self.dense = nn.ModuleList(nn.Linear(6, 6) for _ in plan)
        self.conv = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in plan)
        self.last = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for i, (name, a, b) in enumerate(self.plan):
            one, two = made[a % len(made)], made[b % len(made)]
            if name in ("dense", "conv"):
                made.append((self.dense if name == "dense" else self.conv)[i](one))
            elif name == "where":
                made.append(torch.where(one > 0, one, two))
            else:
                made.append(UNARY[name](one) if name in UNARY else BINARY[name](one, two))
        return self.last(sum(made[-3:]).flatten(1))


STEPS = st.tuples(st.sampled_from(["dense", "conv", *UNARY, *BINARY]), st.integers(0, 9), st.integers(0, 9))


PLANS = st.lists(STEPS, min_size=2, max_size=9)


def complete_under_all_rules(plan, folder):
    torch.manual_seed(0)
    model = open_net(Random(plan), folder, (4, 6))
    x, baseline, to = points(), points(seed=1), target(0, 1, 0)
    for rule in RULED.values():
        assert gap(model, x, to, baseline, rule) < EXACT


@settings(max_examples=8, deadline=None, derandomize=True)
@given(plan=PLANS)
def test_random_graphs_are_complete_under_all_rules(plan, tmp_path_factory):
    complete_under_all_rules(plan, tmp_path_factory.mktemp("random"))


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(plan=PLANS)
def test_100_random_graphs_are_complete_under_all_rules(plan, tmp_path_factory):
    complete_under_all_rules(plan, tmp_path_factory.mktemp("random"))


def test_a_batch_frozen_at_one_is_explained_row_by_row(tmp_path):
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(20, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x)).reshape(1, 20))

    torch.manual_seed(0)
    net = Frozen().double()
    path = tmp_path / "frozen.pt"
    save_traced(net, (4, 6), path, batch=1)
    model = models.load(path, precision="float64")
    with pytest.warns(match="frozen at 1"):
        model.engine((4, 6))
    for rule in RULED.values():
        assert gap(model, points(), target(0, 1, 0), points(seed=1), rule) < EXACT
