import pytest
import torch
from method_nets import Kinked, Linear, Quadratic, Relu, away, batch, open_net, target
from torch import Tensor

from attrcli import methods
from attrcli.errors import UsageError
from attrcli.model import Model
from attrcli.score import Target


def smoothgrad(model: Model, x: Tensor, to: Target, **options: object) -> Tensor:
    return methods.load("smoothgrad", options).attribute(model, x, to, None).values


@pytest.fixture
def kinked(tmp_path) -> Model:
    torch.manual_seed(0)
    return open_net(Kinked(), tmp_path, (2, 9, 13))


def test_of_a_linear_score_every_copy_is_the_weights(tmp_path) -> None:
    net = Linear(6)
    model, x, to = open_net(net, tmp_path, (6,)), batch(2, 6), target(0, 1)
    weights = net.layer.weight[:2]
    assert away(smoothgrad(model, x, to), weights) < 1e-14
    assert away(smoothgrad(model, x, to, reduce="squared"), weights**2) < 1e-14
    assert smoothgrad(model, x, to, reduce="variance").abs().max() < 1e-15


def test_without_noise_it_is_the_gradient(kinked: Model) -> None:
    x, to = batch(2, 2, 9, 13), target(0, 1)
    expected = methods.load("gradient").attribute(kinked, x, to, None).values
    assert away(smoothgrad(kinked, x, to, noise=0), expected) < 1e-12
    assert away(smoothgrad(kinked, x, to, noise=0, reduce="squared"), expected**2) < 1e-12
    assert smoothgrad(kinked, x, to, noise=0, reduce="variance").max() < 1e-14


@pytest.mark.parametrize("noise", [0.15, 3.0])
def test_pairs_make_the_mean_of_a_quadratic_score_exact(noise: float, tmp_path) -> None:
    net = Quadratic(7)
    model, x = open_net(net, tmp_path, (7,)), batch(2, 7)
    expected = torch.einsum("nij,nj->ni", net.a, x) + net.w
    assert away(smoothgrad(model, x, target(0, 1), samples=2, noise=noise), expected) < 1e-13


def test_variance_of_a_quadratic_score_tends_to_that_of_the_noise(tmp_path) -> None:
    """Var(A e) = sigma^2 diag(A A^T); with n copies in pairs its relative error is about sqrt(4 / n)."""
    torch.manual_seed(0)
    net = Quadratic(4)
    model, x = open_net(net, tmp_path, (4,)), batch(2, 4)
    model.rows = 4000
    sigma = 0.2 * (x.amax(1) - x.amin(1))
    expected = sigma[:, None] ** 2 * (net.a @ net.a.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    found = smoothgrad(model, x, target(0, 1), samples=40000, noise=0.2, reduce="variance")
    assert (found / expected - 1).abs().max() < 0.05


def test_squared_is_mean_squared_plus_variance(kinked: Model) -> None:
    x, to = batch(3, 2, 9, 13), target(0, 1, 2)
    mean, squared, variance = (
        smoothgrad(kinked, x, to, samples=10, reduce=how) for how in ("mean", "squared", "variance")
    )
    assert away(mean**2 + variance, squared) < 1e-12
    assert (variance >= 0).all()
    assert variance.max() > 0


def test_mean_keeps_the_sign(kinked: Model) -> None:
    values = smoothgrad(kinked, batch(1, 2, 9, 13), target(0))
    assert (values < 0).any()
    assert (values > 0).any()


def test_noise_depends_on_the_seed_of_the_sample_alone(kinked: Model) -> None:
    x = batch(1, 2, 9, 13).expand(4, -1, -1, -1)
    index = torch.zeros(4, dtype=torch.long)
    first = smoothgrad(kinked, x, Target(index, seed=torch.tensor([1, 2, 1, 2**62])))
    assert away(first[2:3], first[0:1]) < 1e-12
    assert away(first[1:2], first[0:1]) > 1e-3
    assert away(first[3:4], first[0:1]) > 1e-3
    unseeded = smoothgrad(kinked, x[:1], Target(index[:1]))
    assert away(smoothgrad(kinked, x[:1], Target(index[:1])), unseeded) == 0


@pytest.mark.parametrize("features", [5, 16, 23])
def test_noise_does_not_depend_on_how_it_is_cut_into_passes(features: int, tmp_path) -> None:
    """torch draws a tensor of 16 numbers or more in blocks: the copies must be drawn one by one."""
    torch.manual_seed(0)
    model = open_net(Relu(features), tmp_path, (features,))
    x, to = batch(2, features), target(0, 1)
    expected = smoothgrad(model, x, to, samples=12, noise=1)
    for rows in (1, 2, 3, 5):
        model.rows = rows
        assert away(smoothgrad(model, x, to, samples=12, noise=1), expected) < 1e-12


def test_noise_is_a_fraction_of_the_range_of_each_sample(tmp_path) -> None:
    """Ten times the range is ten times the noise: of a quadratic score, a hundred times the variance."""
    torch.manual_seed(0)
    model, x = open_net(Quadratic(5), tmp_path, (5,)), batch(1, 5)
    to = Target(torch.zeros(1, dtype=torch.long), seed=torch.tensor([3]))
    small, large = (smoothgrad(model, part, to, reduce="variance") for part in (x, 10 * x + 4))
    assert away(large, 100 * small) < 1e-9
    flat = torch.full_like(x, 2.5)
    gradient = methods.load("gradient").attribute(model, flat, to, None).values
    assert away(smoothgrad(model, flat, to), gradient) < 1e-14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 5}, "samples=5 must be even"),
        ({"samples": 0}, "samples=0 must be even and at least 2"),
        ({"noise": -0.1}, r"noise=-0.1 must be finite and not negative"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=f"smoothgrad: {message}"):
        methods.load("smoothgrad", options)
