"""What every method keeps, over the registry; and that each keeps exactly the axioms that it claims."""

import itertools
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from method_nets import (
    FORMATS,
    away,
    batch,
    family,
    images,
    open_net,
    predicted,
    sample,
    target,
)
from torch import Tensor

from attrcli import methods
from attrcli.methods import METHODS
from attrcli.methods._method import Attribution, shape_of
from attrcli.model import Model, Target

VARIANTS: dict[str, list[dict[str, object]]] = {
    "expected_gradients": [{"steps": 40}],
    "attention_rollout": [{}, {"heads": "max", "discard": 0.3}],
    "excitation_backprop": [{}, {"contrastive": True}],
    "guided_backprop": [{}, {"acts": "all"}],
    "deeplift": [{"rule": rule} for rule in ("rescale", "revealcancel", "genomics")],
    "integrated_gradients": [{"steps": 20}, {"rule": "trapezoid", "steps": 9}, {"steps": "auto", "tolerance": 0.2}],
    "lrp": [
        {},
        {"composite": "epsilon"},
        {"composite": "epsilon_plus_wsquare"},
        {"composite": "epsilon_gamma", "gamma": 0.5},
        {"composite": "epsilon_alpha2_beta1_flat"},
    ],
    "occlusion": [{}, {"patch": 5, "stride": 3}],
    "prune_grad": [{}, {"max_output_change": 0.15}],
    "prune_int": [{"steps": 3}],
    "smoothgrad": [{"samples": 6, "reduce": reduce} for reduce in ("mean", "squared", "variance")],
}
"""Options to test a method with, cheap ones; a method that is not here is tested with its defaults."""

CASES = [(name, options) for name in METHODS for options in VARIANTS.get(name, [{}])]
SHAPE = (2, 9, 13)
"""Not a multiple of 16 elements: torch draws those in blocks, whose borders would hide a draw that depends on them."""

AXIOMS = {
    "attention_rollout": {"batch_exact"},
    "deconvnet": {"dummy", "batch_exact"},
    "deeplift": {"complete", "dummy", "linear", "batch_exact"},
    "expected_gradients": {"complete", "dummy", "linear", "batch_exact"},
    "excitation_backprop": {"batch_exact"},
    "grad_cam": {"batch_exact"},
    "grad_cam_pp": {"batch_exact"},
    "gradient": {"dummy", "linear", "gradient", "batch_exact"},
    "guided_backprop": {"dummy", "batch_exact"},
    "guided_grad_cam": {"dummy", "batch_exact"},
    "input_x_gradient": {"dummy", "linear", "batch_exact"},
    "integrated_gradients": {"complete", "dummy", "linear", "batch_exact"},
    "layer_cam": {"batch_exact"},
    "lrp": {"conservative", "batch_exact"},
    "occlusion": {"linear", "batch_exact"},
    "prune_grad": {"dummy", "batch_exact"},
    "prune_int": {"dummy", "batch_exact"},
    "saliency": {"dummy", "batch_exact"},
    "smoothgrad": {"dummy", "batch_exact"},
}

FOLDER = tempfile.TemporaryDirectory()


def folder() -> Path:
    """A new folder: nets of one class are files of one name."""
    return Path(tempfile.mkdtemp(dir=FOLDER.name))


case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES]
)


def given(name: str, baseline: Tensor) -> Tensor:
    """Baselines as a method takes them: one each, or a set, of two equal ones so that the mean score is known."""
    return torch.stack([baseline, baseline], 1) if "baselines" in methods.description(name).needs else baseline


def expected_shape(name: str, x: Tensor) -> tuple[int, ...]:
    """Shape of a method's attributions for a batch."""
    return (len(x), *shape_of(methods.load(name), tuple(x.shape[1:])))


def explain(name: str, options: dict[str, object], model: Model, x: Tensor, to: Target, baseline: Tensor) -> Tensor:
    return attribution(name, options, model, x, to, baseline).values


def attribution(
    name: str, options: dict[str, object], model: Model, x: Tensor, to: Target, baseline: Tensor
) -> Attribution:
    result: Attribution = methods.load(name, options).attribute(model, x, to, given(name, baseline))
    return result


@cache
def opened(name: str, which: int, precision: str = "float64") -> Model:
    """One of the nets of a method's family, for all its tests."""
    torch.manual_seed(0)
    return open_net(family(name).nets[which](), folder(), SHAPE, precision=precision)


@cache
def of_rank(name: str, shape: tuple[int, ...]) -> Model:
    """A net of a method's family for samples of a shape, for all its options."""
    torch.manual_seed(1)
    return open_net(family(name).any_rank(shape), folder(), shape)


@cache
def constant(name: str, reads: bool) -> Model:
    """A net of a method's family whose scores are constants, for all its options."""
    make = family(name).constant
    assert make is not None
    return open_net(make(reads), folder(), SHAPE)


@pytest.fixture(params=[0, 1], ids=["smooth", "kinked"])
def net(request: pytest.FixtureRequest, name: str) -> Model:
    return opened(name, request.param)


@case
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_shape_and_type(name: str, options: dict[str, object], precision: str) -> None:
    if bundled := family(name).bundled:
        model, (x, baseline) = sample(bundled[0], precision=precision), images()
    else:
        model, x = opened(name, 0, precision), batch(3, *SHAPE)
        baseline = torch.zeros_like(x)
    x, baseline = x[:3].to(model.dtype), baseline[:3].to(model.dtype)
    result = methods.load(name, options).attribute(model, x, target(0, 1, 2), given(name, baseline))
    assert result.values.shape == expected_shape(name, x)
    assert result.values.dtype in (model.dtype, torch.float64)
    assert not result.values.requires_grad
    assert torch.isfinite(result.values).all()
    assert result.values.abs().sum() > 0
    assert result.note is None or len(result.note) == 3
    for column in (result.baseline_score, result.remainder):
        assert column is None or column.shape == (3,)
    for like, given_too in ((result.multipliers, "multipliers"), (result.standard_error, "standard_error")):
        assert (like is not None) is (given_too in methods.description(name).gives)
        assert like is None or like.shape == result.values.shape


@pytest.mark.parametrize(
    ("name", "options", "shape"), [(n, o, shape) for n, o in CASES for shape in family(n).ranks], ids=str
)
def test_samples_of_any_rank(name: str, options: dict[str, object], shape: tuple[int, ...]) -> None:
    x = batch(2, *shape)
    values = explain(name, options, of_rank(name, shape), x, target(0, 1), torch.zeros_like(x))
    assert values.shape == expected_shape(name, x)


@case
def test_inputs_baseline_target_and_model_stay_as_they_were(name: str, options: dict[str, object], net: Model) -> None:
    x, baseline, to = batch(3, *SHAPE), batch(3, *SHAPE, seed=1), target(0, 1, 2)
    held = [x, baseline, to.index, to.seed, *net.engine(SHAPE).run.state_dict().values()]
    before = [tensor.clone() for tensor in held]
    state, scores = torch.get_rng_state(), net.scores(x, to)
    explain(name, options, net, x, to, baseline)
    assert all(torch.equal(old, new) for old, new in zip(before, held, strict=True))
    assert all(not tensor.requires_grad and tensor.grad is None for tensor in held)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.scores(x, to), scores)


@case
def test_a_row_does_not_depend_on_the_others(name: str, options: dict[str, object], net: Model) -> None:
    x, baseline = batch(7, *SHAPE), batch(7, *SHAPE, seed=1)
    to = target(0, 1, 2, 0, 1, 2, 0)
    whole = explain(name, options, net, x, to, baseline)
    for rows in ([2], [4], [1, 4, 6], [6, 5, 4, 3, 2, 1, 0]):
        part = explain(name, options, net, x[rows], to.take(torch.tensor(rows)), baseline[rows])
        assert away(part, whole[rows]) < 1e-12


@case
def test_rows_per_pass_change_nothing(name: str, options: dict[str, object], net: Model) -> None:
    x, baseline, to = batch(3, *SHAPE), batch(3, *SHAPE, seed=1), target(0, 1, 2)
    expected = explain(name, options, net, x, to, baseline)
    largest, kept = [], net.rows
    net.on_pass = largest.append
    try:
        for rows in (1, 3, 64):
            net.rows = rows
            assert away(explain(name, options, net, x, to, baseline), expected) < 1e-12
            assert max(largest) <= rows
            largest.clear()
    finally:
        net.rows, net.on_pass = kept, lambda rows: None


@case
def test_the_same_again_is_the_same_to_the_bit(name: str, options: dict[str, object], net: Model) -> None:
    x, baseline, to = batch(3, *SHAPE), batch(3, *SHAPE, seed=1), target(0, 1, 2)
    first = explain(name, options, net, x, to, baseline)
    torch.manual_seed(123)
    assert torch.equal(explain(name, options, net, x, to, baseline), first)


@pytest.mark.parametrize(
    ("name", "options", "net_name", "precision", "limit"),
    [
        pytest.param(name, options, net, precision, limit, marks=() if default else pytest.mark.slow)
        for name in METHODS
        for net in family(name).bundled
        for number, options in enumerate(VARIANTS.get(name, [{}]))
        for precision, limit, default in (("float32", 1e-5, number == 0), ("float64", 1e-10, True))
    ],
    ids=str,
)
def test_three_formats_one_answer(
    name: str, options: dict[str, object], net_name: str, precision: str, limit: float
) -> None:
    dtype = torch.float32 if precision == "float32" else torch.float64
    x, baseline = (part[:3].to(dtype) for part in images())
    to = target(*predicted(net_name)[:3].tolist())
    if name == "occlusion":
        options = {"patch": 6, "stride": 4}
    found = [explain(name, options, sample(net_name, suffix, precision), x, to, baseline) for suffix in FORMATS]
    assert away(found[1], found[0]) < limit
    assert away(found[2], found[0]) < limit


@case
def test_a_zero_input_is_explained(name: str, options: dict[str, object], net: Model) -> None:
    x = torch.zeros(2, *SHAPE, dtype=torch.float64)
    for baseline in (x, batch(2, *SHAPE)):
        assert torch.isfinite(explain(name, options, net, x, target(0, 1), baseline)).all()


@pytest.mark.parametrize(
    ("name", "options", "reads"),
    [(n, o, reads) for n, o in CASES if family(n).constant for reads in (True, False)],
    ids=str,
)
def test_a_constant_score_gives_zero(name: str, options: dict[str, object], reads: bool) -> None:
    x = batch(2, *SHAPE)
    values = explain(name, options, constant(name, reads), x, target(0, 1), torch.zeros_like(x))
    assert torch.equal(values.double(), torch.zeros(expected_shape(name, x)).double())


# -- axioms --------------------------------------------------------------------------------------------------------


Attribute = Callable[[Tensor, Tensor, Target], Attribution]


def complete(attribute: Attribute, model: Model) -> bool:
    """Attributions sum to score(x) - score(x')."""
    x, baseline, to = batch(3, *SHAPE), batch(3, *SHAPE, seed=1), target(0, 1, 2)
    values = attribute(x, baseline, to).values
    gap = values.flatten(1).sum(1) - (model.scores(x, to) - model.scores(baseline, to))
    # Half a thousandth: the trapezoid of nine points; Gauss-Legendre is exact to rounding, which its own test says.
    return bool((gap.abs() < 5e-4 * values.flatten(1).abs().sum(1)).all())


def conservative(attribute: Attribute, model: Model) -> bool:
    """Attributions and what the method says it leaves unattributed sum to score(x)."""
    x, to = batch(3, *SHAPE), target(0, 1, 2)
    result = attribute(x, batch(3, *SHAPE, seed=1), to)
    values, rest = result.values.flatten(1), 0 if result.remainder is None else result.remainder
    return bool(((values.sum(1) + rest - model.scores(x, to)).abs() < 1e-9 * values.abs().sum(1)).all())


def dummy(attribute: Attribute, model: Model) -> bool:
    """Elements that the score does not depend on get exactly zero."""
    values = attribute(batch(3, *SHAPE), batch(3, *SHAPE, seed=1), target(0, 1, 2)).values
    return values.shape[1:] == SHAPE and bool((values.flatten(1)[:, ::3] == 0).all())


def linear(attribute: Attribute, model: Model) -> bool:
    """The attribution of 2 f - 3 g is 2 x that of f - 3 x that of g."""
    x, baseline = batch(1, *SHAPE), batch(1, *SHAPE, seed=1)
    f, g, mixed = (attribute(x, baseline, target(k)).values for k in range(3))
    return away(mixed, 2 * f - 3 * g) < 1e-10


def gradient(attribute: Attribute, model: Model) -> bool:
    """The vector-Jacobian product of the net that was saved, by autograd."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        x, net = batch(3, *SHAPE), torch.jit.load(model.path)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net(leaf)[[0, 1, 2], [0, 1, 2]].sum(), leaf)
    values = attribute(x, batch(3, *SHAPE, seed=1), target(0, 1, 2)).values
    return values.shape == expected.shape and away(values, expected) < 1e-12


def batch_exact(attribute: Attribute, model: Model) -> bool:
    """A row alone is the row among others."""
    x, baseline, to = batch(3, *SHAPE), batch(3, *SHAPE, seed=1), target(0, 1, 2)
    alone = attribute(x[1:2], baseline[1:2], to.take(torch.tensor([1]))).values
    return away(alone, attribute(x, baseline, to).values[1:2]) < 1e-12


CHECKS = {check.__name__: check for check in (complete, conservative, dummy, linear, gradient, batch_exact)}


def test_claims_are_those_of_the_table() -> None:
    assert {name: set(methods.description(name).axioms) for name in METHODS} == AXIOMS


@pytest.mark.parametrize(("name", "axiom"), list(itertools.product(METHODS, CHECKS)))
def test_a_claim_holds_for_all_options_and_what_is_not_claimed_fails_for_some(name: str, axiom: str) -> None:
    smooth = opened(name, 0)
    variants = [options for options in VARIANTS.get(name, [{}]) if options.get("steps") != "auto"]

    def holds(options: dict[str, object]) -> bool:
        return CHECKS[axiom](lambda x, baseline, to: attribution(name, options, smooth, x, to, baseline), smooth)

    assert all(map(holds, variants)) is (axiom in AXIOMS[name])
