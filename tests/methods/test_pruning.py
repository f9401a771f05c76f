"""Pruning for an input: the invariants of its scores and maps, against plain torch, autograd and algebra."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from method_nets import Kinked, Linear, away, batch, images, open_net, sample, target
from torch import Tensor, nn
from torch.nn import functional as F

from attrcli import methods
from attrcli import model as models
from attrcli.errors import AttrcliWarning, ModelError, NonFiniteError, UsageError
from attrcli.graph import engine, neurons
from attrcli.methods import _pruning as pruning

SHAPE = (2, 8, 8)


class Reused(nn.Module):
    """One ReLU module called three times, on tensors of different shapes, once in place; and a functional one."""

    def __init__(self, bias: bool = True, skip: bool = True) -> None:
        super().__init__()
        self.skip, self.relu, self.inplace = skip, nn.ReLU(), nn.ReLU(inplace=True)
        self.first = nn.Conv2d(2, 5, 3, padding=1, bias=bias)
        self.second = nn.Conv2d(5, 5, 3, padding=1, bias=bias)
        self.third, self.last = nn.Linear(5 * 16, 9, bias=bias), nn.Linear(9, 4, bias=bias)

    def layers(self, x: Tensor, masks: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The logits, and each activation after its mask: the oracle, written by hand."""
        seen: list[Tensor] = []

        def at(value: Tensor) -> Tensor:
            value = value if masks is None else value * masks[len(seen)]
            seen.append(value)
            return value

        h = F.max_pool2d(at(self.relu(self.first(x))), 2)
        inner = self.second(h)
        h = at(self.inplace(inner + h if self.skip else inner))
        h = at(F.relu(self.third(h.flatten(1))))
        return self.last(h), seen

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[0]


def made(net: nn.Module, folder: Path, shape: tuple[int, ...] = SHAPE, ops: str = "relu"):
    """A net's file opened, with its neurons."""
    model = open_net(net, folder, shape)
    return model, pruning.Network(model, torch.zeros(2, *shape, dtype=torch.float64), ops, "prune_grad")


def scores(net: pruning.Network, x: Tensor, to: object) -> dict[str, Tensor]:
    return pruning.gradient_scores(net, x, to)[0]


@pytest.fixture
def reused() -> Reused:
    torch.manual_seed(3)
    return Reused()


def by_hand(net: Reused, x: Tensor, k: int, q: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Map, logits and masks of one sample (1, ...) by hooks-free autograd and NumPy's percentile."""
    logits, seen = net.layers(x.clone().requires_grad_())
    slopes = torch.autograd.grad(logits[0, k], seen)
    found = [(a * g).abs() for a, g in zip(seen, slopes, strict=True)]
    limit = np.percentile(np.concatenate([s.detach().numpy().ravel() for s in found]), 100 * q)
    masks = [(s > limit).double() for s in found]
    leaf = x.clone().requires_grad_()
    after, _ = net.layers(leaf, masks)
    return torch.autograd.grad(after[0, k], leaf)[0], after.detach(), masks


@pytest.mark.parametrize("q", [0.0, 0.37, 0.7, 0.9, 0.99])
def test_reused_functional_and_in_place_relus_as_by_hand(reused: Reused, q: float, tmp_path: Path) -> None:
    model, net = made(reused, tmp_path)
    assert len(net.layers) == 3
    x, to = batch(4, *SHAPE), target(0, 1, 2, 3)
    values = methods.load("prune_grad", {"sparsity": q}).attribute(model, x, to, None)
    done = pruning.prune(net, x, to, pruning.gradient_scores, q, None)
    for row in range(4):
        expected, after, masks = by_hand(reused, x[row : row + 1], row, q)
        assert away(values.values[row : row + 1], expected) < 1e-12
        torch.testing.assert_close(done.after[row : row + 1], after, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(done.masks.values(), masks, strict=True):
            assert torch.equal(mine[row : row + 1].double(), theirs)
        kept, total = sum(float(m.sum()) for m in masks), sum(m.numel() for m in masks)
        assert float(done.sparsity[row]) == pytest.approx(1 - kept / total, abs=1e-12)
        p, pruned = reused(x)[row].softmax(0)[row], after[0].softmax(0)[row]
        assert float(done.change[row]) == pytest.approx(float((pruned - p).abs() / p), rel=1e-9)
        assert values.note[row].startswith(f"sparsity={1 - kept / total:.4f} change=")


def test_an_oracle_of_forward_hooks_on_the_eager_net(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model, _ = made(net, tmp_path)
    x = batch(1, *SHAPE)
    kept: list[Tensor] = []
    hooks = [net[i].register_forward_hook(lambda m, i, out: (out.retain_grad(), kept.append(out))[1]) for i in (1, 3)]
    net(x.clone().requires_grad_())[0, 2].backward()
    for hook in hooks:
        hook.remove()
    found = [(a * a.grad).abs() for a in kept]
    limit = float(np.percentile(torch.cat([s.flatten() for s in found]).detach().numpy(), 80))
    for i, s in zip((1, 3), found, strict=True):
        net[i].register_forward_hook(lambda m, given, out, s=s: out * (s > limit))
    leaf = x.clone().requires_grad_()
    net(leaf)[0, 2].backward()
    values = methods.load("prune_grad", {"sparsity": 0.8}).attribute(model, x, target(2), None).values
    assert float(values.abs().max()) > 0
    assert away(values, leaf.grad) < 1e-12


# -- the invariants ------------------------------------------------------------------------------------------------


def test_masking_dead_neurons_changes_nothing(reused: Reused, tmp_path: Path) -> None:
    model, net = made(reused, tmp_path)
    x, to = batch(3, *SHAPE), target(0, 1, 2)
    with torch.no_grad():
        before = net.logits(x, to, record=True)
    alive = {name: value > 0 for name, value in net.gradients(torch.zeros(()))[0].items()}
    assert 0.2 < float(torch.cat([m.flatten() for m in alive.values()]).double().mean()) < 0.8
    done = pruning.finish(net, x, to, before, alive)
    assert torch.equal(done.after, before)
    assert torch.equal(done.values, model.gradient(x, to)[0])


def test_in_the_last_layer_all_three_agree_product_ablation_integral(reused: Reused, tmp_path: Path) -> None:
    model, net = made(reused, tmp_path)
    x, to = batch(2, *SHAPE), target(1, 2)
    last = net.layers[-1]
    product = scores(net, x, to)[last]
    integral = pruning.integrated_scores(net, x, to, 4)[0][last]
    whole = model.scores(x, to)
    assert float(product.max()) > 0
    assert away(integral, product) < 1e-13
    for neuron in range(product.shape[1]):
        mask = torch.ones_like(product)
        mask[:, neuron] = 0
        ablated = net.scored(x, to, net.logits(x, to, {last: mask}))
        torch.testing.assert_close((whole - ablated).abs(), product[:, neuron], rtol=1e-10, atol=1e-13)


def test_without_biases_each_cut_carries_the_score(tmp_path: Path) -> None:
    torch.manual_seed(1)
    eager = Reused(bias=False, skip=False).double()
    model, net = made(eager, tmp_path)
    x, to = batch(2, *SHAPE), target(0, 3)
    expected = model.scores(x, to)
    gradient = model.gradient(x, to)[0]
    torch.testing.assert_close((x * gradient).flatten(1).sum(1), expected, rtol=1e-12, atol=1e-13)
    with torch.enable_grad():
        values, slopes = net.gradients(net.scored(x, to, net.logits(x, to, record=True)))
    for name in net.layers:
        torch.testing.assert_close((values[name] * slopes[name]).flatten(1).sum(1), expected, rtol=1e-12, atol=1e-13)


def test_a_layer_beside_a_skip_is_no_cut(tmp_path: Path) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8, bias=False), nn.Linear(6, 3, bias=False)
            self.last = nn.Linear(8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.one(x))) + F.relu(self.two(x))

    torch.manual_seed(0)
    model, net = made(Beside(), tmp_path, (6,))
    x, to = batch(2, 6), target(0, 1)
    x[:, 0] += 2
    with torch.enable_grad():
        values, slopes = net.gradients(net.scored(x, to, net.logits(x, to, record=True)))
    parts = [(values[name] * slopes[name]).flatten(1).sum(1) for name in net.layers]
    torch.testing.assert_close(parts[0] + parts[1], model.scores(x, to), rtol=1e-12, atol=1e-13)
    assert all(float((part - model.scores(x, to)).abs().max()) > 1e-3 for part in parts)


def test_signed_integrals_add_up_to_the_layer(reused: Reused, tmp_path: Path) -> None:
    model, net = made(reused, tmp_path)
    x, to = batch(2, *SHAPE), target(1, 2)
    found = pruning.signed_integrated(net, x, to, 100)
    for name in net.layers:
        zero = {name: torch.zeros_like(found[name])}
        expected = model.scores(x, to) - net.scored(x, to, net.logits(x, to, zero))
        gap = (found[name].flatten(1).sum(1) - expected).abs()
        assert float((gap / found[name].flatten(1).abs().sum(1)).max()) < 5e-3, name


def test_alpha_runs_uniformly_from_0_to_1(tmp_path: Path) -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x).square()  # midpoint is exact on the linear gradient 2 alpha a

    _, net = made(Squared(), tmp_path, (5,))
    x = batch(1, 5).abs()
    for steps in (1, 10):
        found = pruning.integrated_scores(net, x, target(3), steps)[0][net.layers[0]]
        expected = torch.zeros_like(x)
        expected[0, 3] = x[0, 3] ** 2
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", ["prune_grad", "prune_int"])
@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_a_linear_model_has_its_weights_for_every_sparsity_and_a_warning(method: str, q: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Linear(12)
    model = open_net(eager, tmp_path, (12,))
    with pytest.warns(AttrcliWarning, match="has no nonlinearity, so that .* the map is the gradient"):
        found = methods.load(method, {"sparsity": q}).attribute(model, batch(3, 12), target(0, 1, 2), None)
    assert torch.equal(found.values, eager.layer.weight.detach())
    assert found.note == ("no neurons",) * 3


def test_at_full_sparsity_the_best_neuron_stays_and_its_path_is_the_map(reused: Reused, tmp_path: Path) -> None:
    _, net = made(reused, tmp_path)
    x, to = batch(2, *SHAPE), target(1, 2)
    found = scores(net, x, to)
    done = pruning.prune(net, x, to, pruning.gradient_scores, 1.0, None)
    flat = torch.cat([m.flatten(1) for m in done.masks.values()], 1)
    assert flat.sum(1).tolist() == [1, 1]
    assert torch.equal(flat.int().argmax(1), torch.cat([s.flatten(1) for s in found.values()], 1).argmax(1))


def test_of_two_layers_the_single_best_neuron_of_the_last_gives_its_jacobian(tmp_path: Path) -> None:
    torch.manual_seed(2)
    eager = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    model, net = made(eager, tmp_path, (6,))
    x, to = batch(2, 6), target(1, 2)
    values = methods.load("prune_grad", {"sparsity": 1.0}).attribute(model, x, to, None).values
    best = scores(net, x, to)[net.layers[0]].argmax(1)
    expected = torch.stack([eager[2].weight[k, j] * eager[0].weight[j] for k, j in zip((1, 2), best, strict=True)])
    assert away(values, expected.detach()) < 1e-13


def test_the_kept_set_shrinks_with_sparsity(reused: Reused, tmp_path: Path) -> None:
    _, net = made(reused, tmp_path)
    x, to = batch(2, *SHAPE), target(1, 2)
    found, larger = scores(net, x, to), None
    counts = []
    for q in np.linspace(0, 1, 21):
        flat = torch.cat([m.flatten(1) for m in pruning.masks_at(found, [float(q)] * 2).values()], 1)
        assert larger is None or not bool((flat & ~larger).any())
        larger = flat
        counts.append(int(flat[0].sum()))
    assert counts[0] > counts[18] > counts[-1] == 1


def test_scaling_the_score_scales_the_map_and_keeps_the_ranking(reused: Reused, tmp_path: Path) -> None:
    x, to = batch(2, *SHAPE), target(1, 2)
    maps = []
    for factor in (1.0, 8.0):
        with torch.no_grad():
            reused.last.weight.mul_(factor)
            reused.last.bias.mul_(factor)
        model = open_net(reused, tmp_path, SHAPE)
        maps.append(methods.load("prune_grad", {"sparsity": 0.8}).attribute(model, x, to, None).values)
    assert torch.equal(maps[1], 8 * maps[0])


def test_a_threshold_is_numpys_percentile_and_ties_go_together() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {"a": torch.rand(3, 4, 5, 6, generator=generator), "b": torch.rand(3, 7, generator=generator)}
    layers["a"] = layers["a"].contiguous(memory_format=torch.channels_last)
    layers["b"][:, :3] = 0.5
    for q in (0.0, 0.1, 0.5, 0.93, 0.999):
        for row in range(3):
            values = np.concatenate([layer[row].numpy().ravel() for layer in layers.values()])
            expected = values > np.percentile(values, 100 * q)
            kept = pruning.masks_at(layers, [q] * 3)
            assert np.array_equal(np.concatenate([m[row].numpy().ravel() for m in kept.values()]), expected)


# -- sparsity from an allowed change -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prune_grad", "prune_int"])
def test_the_change_stays_within_what_is_allowed_and_is_used(method: str) -> None:
    model, x = sample("fashion_cnn"), images()[0][:12]
    to = target(*model(x).argmax(1).tolist())
    options = {"max_output_change": 0.15} | ({"steps": 2} if method == "prune_int" else {})
    notes = methods.load(method, options).attribute(model, x, to, None).note
    found = [dict(part.split("=") for part in note.split()[:2]) for note in notes]
    changes, shares = ([float(each[key]) for each in found] for key in ("change", "sparsity"))
    assert max(changes) <= 0.15
    assert max(changes) > 0.1
    assert len(set(shares)) > 6
    assert min(shares) > 0.5


def test_one_number_without_a_sigmoid_is_measured_by_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 1))
    model, net = made(eager, tmp_path, (6,))
    x, to = batch(3, 6), target(0, 0, 0)
    done = pruning.prune(net, x, to, pruning.gradient_scores, 0.6, None)
    expected = ((done.after - done.before) / done.before).abs()[:, 0]
    torch.testing.assert_close(done.change, expected, rtol=1e-12, atol=0)
    note = methods.load("prune_grad", {"sparsity": 0.6}).attribute(model, x, to, None).note
    assert all(text.endswith(" of output") for text in note)


# -- each row for itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prune_grad", "prune_int"])
def test_a_frozen_batch_gives_the_same(method: str, reused: Reused, tmp_path: Path) -> None:
    x, to = batch(3, *SHAPE), target(0, 1, 2)
    free = methods.load(method).attribute(open_net(reused, tmp_path, SHAPE), x, to, None).values
    for frozen in (1, 2):
        path = tmp_path / f"frozen{frozen}.pt2"
        torch.export.save(torch.export.export(reused, (torch.zeros(frozen, *SHAPE, dtype=torch.float64),)), path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttrcliWarning)
            model = models.load(path, precision="float64")
            assert away(methods.load(method).attribute(model, x, to, None).values, free) < 1e-12


@pytest.mark.parametrize("count", [1, 7])
def test_windows_that_hold_the_batch_run_one_by_one(count: int, tmp_path: Path) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[0]
            h = F.relu(self.one(x.reshape(n * 4, 4)))
            return self.two(h.reshape(n, 20))

    torch.manual_seed(0)
    eager = Windows()
    model, _ = made(eager, tmp_path, (16,))
    x, to = batch(count, 16), target(*[0] * count)
    values = methods.load("prune_grad", {"sparsity": 0.7}).attribute(model, x, to, None).values
    for row in range(count):
        h = F.relu(eager.one(x[row].reshape(4, 4)))
        s = (h * eager.two.weight[0].reshape(4, 5)).abs()
        mask = s > float(np.percentile(s.detach().numpy(), 70))
        slope = (eager.two.weight[0].reshape(4, 5) * mask * (h > 0)) @ eager.one.weight
        assert away(values[row : row + 1], slope.reshape(1, 16).detach()) < 1e-12


def test_relus_survive_the_folding_of_a_heavy_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, to = batch(2, 2, 9, 13), target(0, 1)
    plain = open_net(Kinked(), tmp_path, (2, 9, 13))
    values = methods.load("prune_grad").attribute(plain, x, to, None).values
    monkeypatch.setattr(engine, "HEAVY", 1)
    torch.manual_seed(0)
    folded = open_net(Kinked(), tmp_path, (2, 9, 13))
    assert not [n for n in folded.engine((2, 9, 13)).run.graph.nodes if "batch_norm" in n.name]
    assert away(methods.load("prune_grad").attribute(folded, x, to, None).values, values) < 1e-10


# -- what a neuron is ----------------------------------------------------------------------------------------------

SPELLINGS = {
    "relu": lambda x: F.relu(x),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp": lambda x: x.clamp(min=0),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros(1, dtype=x.dtype)),
    "maximum_like": lambda x: torch.maximum(torch.zeros_like(x), x),
    "leaky": lambda x: F.leaky_relu(x, 0.0),
    "where": lambda x: torch.where(x > 0, x, torch.zeros((), dtype=x.dtype)),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 1e9),
}


class Spelt(nn.Module):
    """One hidden layer whose nonlinearity is a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.one, self.two = function, nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self.one(x)))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_relu_is_told_by_value(spelling: str, tmp_path: Path) -> None:
    maps = []
    for name in ("relu", spelling):
        torch.manual_seed(0)
        model, net = made(Spelt(SPELLINGS[name]), tmp_path, (6,))
        assert len(net.layers) == 1
        maps.append(methods.load("prune_grad", {"sparsity": 0.7}).attribute(model, batch(2, 6), target(0, 1), None))
    assert float(maps[0].values.abs().max()) > 0
    assert away(maps[1].values, maps[0].values) < 1e-12


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: F.leaky_relu(x, 0.1), "leaky_relu"),
        (lambda x: x.clamp_min(0.5), "clamp_min"),
        (F.relu6, "relu6"),
        (F.gelu, "gelu"),
        (F.silu, "silu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
    ],
    ids=["leaky_relu", "clamp_min", "relu6", "gelu", "silu", "silu_by_hand"],
)
def test_other_nonlinearities_are_refused_by_name_and_taken_when_asked_for(function, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Spelt(function)
    model = open_net(eager, tmp_path, (6,))
    x, to = batch(2, 6), target(0, 1)
    with pytest.raises(ModelError, match=rf"no relu in the graph.*{name} \(1\).*ops="):
        methods.load("prune_grad").attribute(model, x, to, None)
    with pytest.raises(ModelError, match=r"no relu in the graph"):
        methods.load("prune_int").ruled(model, x)
    values = methods.load("prune_grad", {"ops": f"relu,{name}", "sparsity": 0.5}).attribute(model, x, to, None).values
    a = function(eager.one(x))
    s = (a * eager.two.weight[:2]).abs()
    kept = torch.stack([row > float(np.percentile(row.detach().numpy(), 50)) for row in s])
    leaf = x.clone().requires_grad_()
    (eager.two(function(eager.one(leaf)) * kept)[[0, 1], [0, 1]]).sum().backward()
    assert away(values, leaf.grad) < 1e-12


def test_the_kinds_of_the_samples() -> None:
    for net, count in (("fashion_cnn", 5), ("fashion_mlp", 2)):
        for suffix in (".pt", ".onnx", ".pt2"):
            graph = sample(net, suffix).engine((1, 28, 28)).run
            assert list(neurons.nonlinearities(graph, sample(net, suffix).input).values()) == ["relu"] * count


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prune_grad", "prune_int"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "1.2"}, "sparsity=1.2 must lie between 0 and 1"),
        ({"sparsity": "-0.1"}, "must lie between 0 and 1"),
        ({"sparsity": "nan"}, "does not fit its type"),
        ({"sparsity": 0.5, "max_output_change": 0.1}, "give one of them"),
        ({"max_output_change": -1.0}, "must be finite and not negative"),
        ({"ops": "rleu"}, "did you mean 'relu'"),
        ({"ops": ""}, "'' is no nonlinearity"),
    ],
)
def test_options_out_of_range(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        methods.load(method, options)


def test_steps_below_one() -> None:
    with pytest.raises(UsageError, match="steps=0 must be at least 1"):
        methods.load("prune_int", {"steps": 0})


def test_what_is_not_finite_names_its_node(tmp_path: Path) -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x).log()

    model = open_net(Logarithm(), tmp_path, (4,))
    with pytest.raises(NonFiniteError, match="log"):
        methods.load("prune_grad").attribute(model, -torch.ones(1, 4, dtype=torch.float64), target(0), None)
