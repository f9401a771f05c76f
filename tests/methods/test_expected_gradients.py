"""Expected gradients against closed forms and integrated gradients."""

import pytest
import torch
from method_nets import Linear, Quadratic, SmoothReluNet, away, batch, open_net, target

from attrcli import methods
from attrcli.errors import UsageError

SHAPE = (2, 9, 13)


def explained(model, x, references, to, **options):
    return methods.load("expected_gradients", options).attribute(model, x, to, references)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    torch.manual_seed(0)
    return open_net(SmoothReluNet(), tmp_path_factory.mktemp("net"), SHAPE)


def references(count=5, samples=3):
    return batch(samples * count, *SHAPE, seed=2).reshape(samples, count, *SHAPE)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_linear_score_takes_the_mean_reference(tmp_path, steps):
    model = open_net(Linear(7), tmp_path, (7,))
    x, many = batch(2, 7), batch(6, 7, seed=3).reshape(2, 3, 7)
    weight = model.gradient(x, target(0, 1))[0]
    found = explained(model, x, many, target(0, 1), steps=steps)
    assert away(found.values, weight * (x - many.mean(1))) < 1e-12
    expected = (weight[:, None] * (x[:, None] - many)).std(1) / 3**0.5
    assert away(found.standard_error, expected) < 1e-12


@pytest.mark.parametrize("steps", [1, 3])
def test_a_quadratic_score_closes_exactly(tmp_path, steps):
    model = open_net(Quadratic(5), tmp_path, (5,))
    x, many = batch(2, 5), batch(8, 5, seed=3).reshape(2, 4, 5)
    to = target(0, 1)
    found = explained(model, x, many, to, steps=steps)
    delta = model.scores(x, to) - torch.stack([model.scores(many[:, r], to) for r in range(4)]).mean(0)
    torch.testing.assert_close(found.values.sum(1), delta, rtol=1e-12, atol=1e-12)


def test_it_is_the_mean_of_integrated_gradients(net):
    x, many, to = batch(3, *SHAPE), references(), target(0, 1, 2)
    ig = methods.load("integrated_gradients", {"steps": 1000})
    each = torch.stack([ig.attribute(net, x, to, many[:, r]).values for r in range(5)], 1)
    found = explained(net, x, many, to, steps=1000)
    assert away(found.values, each.mean(1)) < 2e-3  # kinks: both are sums of steps
    assert away(found.standard_error, each.std(1) / 5**0.5) < 5e-3


def test_doubling_the_set_changes_the_error_only(net):
    x, many, to = batch(3, *SHAPE), references(), target(0, 1, 2)
    once, twice = (explained(net, x, torch.cat([many] * k, 1), to) for k in (1, 2))
    assert away(twice.values, once.values) < 1e-12
    assert away(twice.standard_error, once.standard_error * (4 / 9) ** 0.5) < 1e-9


def test_noise_is_by_seed_and_in_expectation_that_of_a_smoothed_gradient(tmp_path):
    model = open_net(Quadratic(5), tmp_path, (5,))
    x, many, to = batch(2, 5), batch(8, 5, seed=3).reshape(2, 4, 5), target(0, 1)
    quiet = explained(model, x, many, to).values
    noisy = explained(model, x, many, to, noise=0.2).values
    assert away(noisy, quiet) > 1e-3
    assert torch.equal(explained(model, x, many, to, noise=0.2).values, noisy)
    assert away(explained(model, x[1:], many[1:], to.take(torch.tensor([1])), noise=0.2).values, noisy[1:]) < 1e-12
    assert away(explained(model, x, many, to, noise=0.2, steps=4000).values, quiet) < 0.05
    model.rows = 1
    assert away(explained(model, x, many, to, noise=0.2).values, noisy) < 1e-12


def test_noise_gives_up_the_claim_to_completeness():
    assert "complete" not in methods.load("expected_gradients", {"noise": 0.1}).axioms
    assert "complete" in methods.load("expected_gradients").axioms


@pytest.mark.parametrize(
    "baseline", [None, batch(3, *SHAPE), references(count=1)], ids=["none", "one each", "set of 1"]
)
def test_a_single_baseline_is_refused(net, baseline):
    with pytest.raises(UsageError, match=r"set of at least 2 baselines.*integrated_gradients"):
        explained(net, batch(3, *SHAPE), baseline, target(0, 1, 2))


@pytest.mark.parametrize("options", [{"steps": 0}, {"noise": -1.0}])
def test_options_out_of_range(options):
    with pytest.raises(UsageError, match="must be"):
        methods.load("expected_gradients", options)
