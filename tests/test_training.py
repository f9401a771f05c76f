"""The training loop: closed forms, repeatability, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attrcli.errors import UsageError
from attrcli.training import fit


def squared_error(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(module(x), y)


def noisy_squared_error(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return squared_error(module, x + 0.1 * torch.randn_like(x), y)


def line(rows: int = 203) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1))
    return x, x @ torch.tensor([[2.0], [-1.0], [0.5]]) + 0.25


def new_module(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 1))


def state(module: nn.Module) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in module.state_dict().values()])


def test_linear_regression_reaches_the_closed_form() -> None:
    module = nn.Linear(3, 1)
    x, y = line()
    history = fit(module, (x, y), squared_error, epochs=60, lr=0.1, batch_size=32)
    torch.testing.assert_close(module.weight.detach(), torch.tensor([[2.0, -1.0, 0.5]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(module.bias.detach(), torch.tensor([0.25]), atol=1e-4, rtol=0)
    assert len(history) == 60
    assert history[-1] < 1e-6 < history[0]


def test_weight_decay_only_shrinks_weights_whose_gradient_is_zero() -> None:
    module = nn.Linear(3, 1, bias=False)
    before = module.weight.detach().clone()
    fit(module, line(10), lambda m, x, y: 0 * m(x).sum(), epochs=1, lr=0.5, batch_size=10, weight_decay=0.1)
    # One step at a tenth of the peak learning rate: w <- (1 - 0.05 * 0.1) w.
    torch.testing.assert_close(module.weight.detach(), before * 0.995)


def test_same_seed_same_weights_whatever_the_global_generator_holds() -> None:
    weights = []
    for seed, noise in ((5, 1), (5, 2), (6, 1)):
        torch.manual_seed(noise)
        module = new_module()
        fit(module, line(), noisy_squared_error, epochs=2, lr=0.01, seed=seed)
        weights.append(state(module))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_global_generator_is_put_back() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fit(new_module(), line(), noisy_squared_error, epochs=1, lr=0.01)
    assert torch.equal(torch.rand(4), expected)


def test_every_row_once_per_epoch_in_batches_of_nearly_equal_size() -> None:
    seen: list[list[int]] = []

    def loss(module: nn.Module, x: Tensor, row: Tensor) -> Tensor:
        seen.append(row.tolist())
        return module(x).square().mean()

    x, _ = line(129)
    fit(new_module(), (x, torch.arange(129)), loss, epochs=2, lr=0.01, batch_size=64)
    assert [len(batch) for batch in seen] == [43] * 6  # never a last batch of one row, which batch norm refuses
    first, second = ([row for batch in seen[i : i + 3] for row in batch] for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(129))
    assert first != second


def test_progress_frozen_parameters_and_final_mode() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    frozen = module[0].weight.clone()
    steps: list[tuple[int, int]] = []
    fit(module, line(), squared_error, epochs=3, lr=0.01, batch_size=102, on_step=lambda i, n, _: steps.append((i, n)))
    assert steps == [(i, 6) for i in range(1, 7)]
    assert torch.equal(module[0].weight, frozen)
    assert not module.training
    assert all(parameter.grad is None for parameter in module.parameters())


def test_gradient_clipping_bounds_the_norm() -> None:
    norms: list[float] = []
    module = nn.Linear(3, 1)

    def on_step(step: int, steps: int, loss: float) -> None:
        norms.append(float(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()))

    x, y = line()
    fit(module, (x, 1000 * y), squared_error, epochs=1, lr=0.01, max_grad_norm=1.0, on_step=on_step)
    assert max(norms) <= 1.0001


def test_loss_that_is_not_finite_names_the_step_and_keeps_the_weights() -> None:
    x, y = line(64)
    module = new_module()
    calls: list[Tensor] = []

    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        return squared_error(module, x, y) * (float("nan") if len(calls) == 3 else 1.0)

    with pytest.raises(UsageError, match="loss is nan at step 3 of 8"):
        fit(module, (x, y), loss, epochs=4, lr=0.01, batch_size=32)
    assert torch.equal(torch.cat([p.detach().flatten() for p in module.parameters()]), calls[-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(nn.Linear(3, 1), (), squared_error, epochs=1, lr=0.1), "same number of rows"),
        (lambda: fit(nn.Linear(3, 1), (torch.zeros(0, 3),), squared_error, epochs=1, lr=0.1), "at least one"),
        (
            lambda: fit(nn.Linear(3, 1), (line(4)[0], line(5)[1]), squared_error, epochs=1, lr=0.1),
            r"\(4, 3\), \(5, 1\)",
        ),
        (lambda: fit(nn.Linear(3, 1), line(4), squared_error, epochs=0, lr=0.1), "epochs=0"),
        (lambda: fit(nn.Linear(3, 1), line(4), squared_error, epochs=1, lr=float("nan")), "lr=nan"),
        (lambda: fit(nn.ReLU(), line(4), squared_error, epochs=1, lr=0.1), "nothing to train"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
