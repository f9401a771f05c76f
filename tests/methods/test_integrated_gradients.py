import warnings

import captum.attr
import numpy as np
import pytest
import torch
from method_nets import (
    FORMATS,
    NETS,
    Linear,
    Quadratic,
    Relu,
    Smooth,
    Sum,
    away,
    batch,
    images,
    open_net,
    predicted,
    sample,
    script,
    target,
    without_ties,
)
from torch import Tensor

from attrcli import methods
from attrcli.errors import AttrcliWarning, UsageError
from attrcli.methods.integrated_gradients import quadrature
from attrcli.model import Model
from attrcli.score import SCORES, Target


def integrate(model: Model, x: Tensor, to: Target, baseline: Tensor, **options: object) -> Tensor:
    return methods.load("integrated_gradients", options).attribute(model, x, to, baseline).values


def gap(values: Tensor, model: Model, x: Tensor, to: Target, baseline: Tensor) -> Tensor:
    """|sum A - delta| as a fraction of the sum of |A|."""
    delta = model.scores(x, to) - model.scores(baseline, to)
    return (values.flatten(1).sum(1) - delta).abs() / values.flatten(1).abs().sum(1)


# -- quadrature ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["gausslegendre", "trapezoid"])
@pytest.mark.parametrize("steps", [2, 3, 10, 50, 400])
def test_weights_sum_to_one_and_nodes_lie_on_the_path(rule: str, steps: int) -> None:
    nodes, weights = quadrature(rule, steps)
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    assert weights @ nodes == pytest.approx(0.5, abs=1e-13)
    assert (weights > 0).all()
    assert nodes[0] >= 0
    assert nodes[-1] <= 1
    assert (np.diff(nodes) > 0).all()


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_gauss_legendre_integrates_polynomials_of_degree_2n_minus_1(steps: int) -> None:
    nodes, weights = quadrature("gausslegendre", steps)
    for degree in range(2 * steps):
        assert weights @ nodes**degree == pytest.approx(1 / (degree + 1), rel=1e-12)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UsageError, match="rule=simpson must be gausslegendre or trapezoid"):
        quadrature("simpson", 5)


# -- closed forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "steps"), [("gausslegendre", 1), ("gausslegendre", 50), ("trapezoid", 2), ("trapezoid", 7)]
)
def test_of_a_linear_score_every_rule_is_exact(rule: str, steps: int, tmp_path) -> None:
    net = Linear(12)
    x, baseline = batch(2, 3, 4), batch(2, 3, 4, seed=1)
    values = integrate(open_net(net, tmp_path, (3, 4)), x, target(2, 0), baseline, rule=rule, steps=steps)
    assert away(values, (x - baseline) * net.layer.weight[[2, 0]].reshape(2, 3, 4)) < 1e-14


@pytest.mark.parametrize(("rule", "steps"), [("gausslegendre", 1), ("trapezoid", 2), ("trapezoid", 5)])
def test_of_a_quadratic_score_the_least_steps_are_exact(rule: str, steps: int, tmp_path) -> None:
    net = Quadratic(6)
    x, baseline, to = batch(2, 6), batch(2, 6, seed=1), target(0, 1)
    model = open_net(net, tmp_path, (6,))
    values = integrate(model, x, to, baseline, rule=rule, steps=steps)
    middle = torch.einsum("nij,nj->ni", net.a, (x + baseline) / 2) + net.w
    assert away(values, (x - baseline) * middle) < 1e-13
    assert gap(values, model, x, to, baseline).max() < 1e-13


def test_trapezoid_counts_a_constant_gradient_in_full(tmp_path) -> None:
    """Captum divides by n where the trapezoid of n points has n - 1 intervals: a share of 1 / n is lost."""
    net = Linear(5)
    model, x = open_net(net, tmp_path, (5,)), batch(1, 5)
    expected = x * net.layer.weight[:1]
    values = integrate(model, x, target(0), torch.zeros_like(x), rule="trapezoid", steps=10)
    assert away(values, expected) < 1e-14
    theirs = captum.attr.IntegratedGradients(net).attribute(x, target=0, n_steps=10, method="riemann_trapezoid")
    assert away(theirs, 0.9 * expected) < 1e-6


def test_of_a_sum_whose_gradient_is_one_number_expanded(tmp_path) -> None:
    x = batch(2, 5)
    assert away(integrate(open_net(Sum(), tmp_path, (5,)), x, target(0, 0), torch.zeros_like(x)), x) < 1e-14


def test_completeness_of_a_smooth_score_is_exact(tmp_path) -> None:
    torch.manual_seed(0)
    model = open_net(Smooth(), tmp_path, (2, 9, 13))
    x, baseline = batch(3, 2, 9, 13), batch(3, 2, 9, 13, seed=1)
    for score in SCORES:
        to = Target(torch.tensor([0, 1, 2]), score, minus=torch.tensor([1, 2, 0]) if score == "logit" else None)
        limit = 1e-2 if score == "margin" else 1e-12  # a margin has kinks of its own
        assert gap(integrate(model, x, to, baseline), model, x, to, baseline).max() < limit


def test_completeness_of_a_relu_score_improves_with_steps(tmp_path) -> None:
    torch.manual_seed(0)
    model = open_net(Relu(10), tmp_path, (10,))
    x, baseline, to = batch(10, 10), batch(10, 10, seed=1), target(*[0] * 10)
    for rule in ("gausslegendre", "trapezoid"):
        gaps = [
            float(gap(integrate(model, x, to, baseline, rule=rule, steps=n), model, x, to, baseline).mean())
            for n in (5, 50, 500)
        ]
        assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]


def test_an_element_that_equals_its_baseline_gets_zero(tmp_path) -> None:
    torch.manual_seed(0)
    model = open_net(Relu(6), tmp_path, (6,))
    x, baseline = batch(2, 6), batch(2, 6, seed=1)
    baseline[:, 3] = x[:, 3]
    assert (integrate(model, x, target(0, 1), baseline)[:, 3] == 0).all()


# -- against Captum and by hand ------------------------------------------------------------------------------------


def captums(net: str, x: Tensor, baseline: Tensor, index: Tensor) -> Tensor:
    explainer = captum.attr.IntegratedGradients(script(net, x.dtype))
    parts = zip(x.split(20), baseline.split(20), index.split(20), strict=True)
    return torch.cat(
        [
            explainer.attribute(a, b, target=c, n_steps=50, method="gausslegendre", internal_batch_size=100)
            for a, b, c in parts
        ]
    )


def by_hand(net: str, x: Tensor, baseline: Tensor, index: Tensor) -> Tensor:
    """The definition, sample by sample, through the ScriptModule."""
    alphas, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(50))
    results = []
    for one, other, k in zip(x, baseline, index, strict=True):
        leaf = (other + (alphas.reshape(-1, 1, 1, 1) + 1) / 2 * (one - other)).requires_grad_()
        (gradient,) = torch.autograd.grad(script(net, x.dtype)(leaf)[:, k].sum(), leaf)
        results.append((one - other) * (weights.reshape(-1, 1, 1, 1) / 2 * gradient).sum(0))
    return torch.stack(results)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("net", NETS)
def test_equals_the_definition_in_float64(net: str, suffix: str) -> None:
    x, baseline = (part[:4] for part in images(torch.float64))
    x, index = without_ties(x), predicted(net)[:4]
    values = integrate(sample(net, suffix, "float64"), x, Target(index), baseline)
    assert away(values, by_hand(net, x, baseline, index)) < 1e-10


def compare_with_captum(net: str, count: int) -> None:
    """Within 1e-8: Captum rounds the weights of its quadrature to float32, whatever the input is."""
    x, baseline = (part[:count] for part in images(torch.float64))
    index = predicted(net)[:count]
    values = integrate(sample(net, precision="float64"), x, Target(index), baseline)
    assert away(values, captums(net, x, baseline, index)) < 1e-8


@pytest.mark.parametrize("net", NETS)
def test_equals_captum_on_bundled_images(net: str) -> None:
    compare_with_captum(net, 10)


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_equals_captum_on_all_bundled_images(net: str) -> None:
    compare_with_captum(net, 60)


@pytest.mark.parametrize("net", NETS)
def test_equals_captum_in_float32_on_all_bundled_images(net: str) -> None:
    """A graph as small as these runs as it was saved: where the winners of max pools hang on the last bit, they are
    the same. (Batch norm folded, as in larger graphs, moves float32 results of such images by some 1e-3, which is as
    far as Captum's own lie from its float64.)"""
    (x, baseline), index = images(), predicted(net)
    values = integrate(sample(net), x, Target(index), baseline)
    assert away(values, captums(net, x, baseline, index)) < 1e-5


# -- steps=auto ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_auto_keeps_the_gap_rule_on_all_bundled_images(net: str) -> None:
    (x, baseline), index = images(), predicted(net)
    result = methods.load("integrated_gradients", {"steps": "auto"}).attribute(sample(net), x, Target(index), baseline)
    with torch.no_grad():
        ends = [script(net)(part).double().gather(1, index[:, None])[:, 0] for part in (x, baseline)]
    flat, delta = result.values.flatten(1), ends[0] - ends[1]
    allowed = 0.01 * torch.maximum(delta.abs(), 1e-3 * flat.abs().sum(1))
    assert ((flat.sum(1) - delta).abs() <= 1.0001 * allowed).all()  # two float32 forwards differ by rounding
    assert result.note is not None
    assert set(result.note) <= {f"steps={25 * 2**k}" for k in range(7)}
    assert len(set(result.note)) > 2


def test_auto_takes_for_each_sample_the_first_doubling_that_closes_its_gap() -> None:
    model, (x, baseline), index = sample("fashion_mlp", precision="float64"), images(torch.float64), None
    x, baseline, index = x[:12], baseline[:12], predicted("fashion_mlp")[:12]
    auto = methods.load("integrated_gradients", {"steps": "auto"})
    result = auto.attribute(model, x, Target(index), baseline)
    assert result.note is not None
    for i in range(12):
        steps = int(result.note[i].removeprefix("steps="))
        row, to = slice(i, i + 1), Target(index[i : i + 1])
        alone = auto.attribute(model, x[row], to, baseline[row])
        assert alone.note == result.note[i : i + 1]
        assert away(alone.values, result.values[row]) < 1e-12
        assert away(integrate(model, x[row], to, baseline[row], steps=steps), result.values[row]) < 1e-12
        if steps > 25:
            fewer = integrate(model, x[row], to, baseline[row], steps=steps // 2)
            delta = model.scores(x[row], to) - model.scores(baseline[row], to)
            assert (fewer.sum() - delta).abs() > 0.01 * delta.abs()


@pytest.mark.parametrize("most", [25, 60, 100])
def test_auto_stops_at_the_cap_with_a_warning_and_a_note(most: int, tmp_path) -> None:
    torch.manual_seed(0)
    model = open_net(Relu(10), tmp_path, (10,))
    x, baseline, to = batch(2, 10), batch(2, 10, seed=1), target(0, 1)
    x[1] = baseline[1]
    method = methods.load("integrated_gradients", {"steps": "auto", "tolerance": 1e-9, "max_steps": most})
    message = f"1 of 2 samples still miss the tolerance 1e-09 at {most} steps: raise max_steps"
    with pytest.warns(AttrcliWarning, match=message):
        result = method.attribute(model, x, to, baseline)
    assert result.note == (f"steps={most} (tolerance missed)", "steps=25")
    assert away(result.values[:1], integrate(model, x, to, baseline, steps=most)[:1]) < 1e-14
    assert (result.values[1] == 0).all()


def test_auto_stops_where_the_gap_drowns_in_the_rounding_of_the_scores(tmp_path) -> None:
    """Scores near 1e6 are known to 0.06 in float32; a difference of about one cannot be closed to one percent."""
    torch.manual_seed(0)
    model = open_net(Relu(10, offset=1e6), tmp_path, (10,), precision="float32")
    x, baseline = batch(8, 10).float(), batch(8, 10, seed=1).float()
    result = methods.load("integrated_gradients", {"steps": "auto"}).attribute(model, x, target(*[0] * 8), baseline)
    assert result.note is not None
    assert "steps=25 (gap within rounding)" in result.note
    assert set(result.note) <= {"steps=25", "steps=25 (gap within rounding)"}


def test_auto_of_an_input_that_is_its_baseline(tmp_path) -> None:
    model, x = sample("fashion_cnn"), images()[0][:3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = methods.load("integrated_gradients", {"steps": "auto"}).attribute(model, x, target(0, 1, 2), x)
    assert (result.values == 0).all()
    assert all(note.startswith("steps=25") for note in result.note or ("",))


# -- options and arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1 for rule=gausslegendre"),
        ({"steps": 1, "rule": "trapezoid"}, "steps=1 must be at least 2 for rule=trapezoid"),
        ({"tolerance": 0}, "tolerance=0.0 must lie between 0 and 1"),
        ({"tolerance": 1}, "tolerance=1.0 must lie between 0 and 1"),
        ({"max_steps": 10}, "max_steps=10 must be at least 25"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=f"integrated_gradients: {message}"):
        methods.load("integrated_gradients", options)


def test_a_baseline_is_needed_and_must_fit(tmp_path) -> None:
    model, x = open_net(Linear(5), tmp_path, (5,)), batch(2, 5)
    method = methods.load("integrated_gradients")
    with pytest.raises(UsageError, match=r"integrated_gradients needs a baseline, shaped like the inputs: \(2, 5\)"):
        method.attribute(model, x, target(0, 1), None)
    with pytest.raises(UsageError, match=r"the baseline is \(1, 5\), the inputs are \(2, 5\)"):
        method.attribute(model, x, target(0, 1), x[:1])


def test_passes_are_those_that_run(tmp_path) -> None:
    model, x = open_net(Linear(5), tmp_path, (5,)), batch(2, 5)
    rows: list[int] = []
    model.on_pass = rows.append
    for options in ({"steps": 7}, {"steps": "auto"}):
        rows.clear()
        method = methods.load("integrated_gradients", options)
        method.attribute(model, x, target(0, 1), torch.zeros_like(x))
        assert sum(rows) == 2 * method.passes((5,))[0]
