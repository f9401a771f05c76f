"""The one training loop of the project: the VAE, the retraining metrics and the sample models use it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attrcli.errors import UsageError

Loss = Callable[..., Tensor]
"""`loss(module, *batch)` -> mean loss of the batch, a scalar; augmentation and label smoothing are its business."""

OnStep = Callable[[int, int, float], None]
"""`on_step(step, steps, loss)`, called after every optimiser step with `step` counted from 1."""


# long: one loop, read from top to bottom
def fit(
    module: nn.Module,
    arrays: Sequence[Tensor],
    loss: Loss,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 128,
    seed: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    device: str | torch.device = "cpu",
    on_step: OnStep | None = None,
) -> list[float]:
    """Train `module` in place and return the mean loss of each epoch.

    AdamW under a one-cycle schedule: the learning rate climbs to `lr` during the first fifth of the steps and
    follows a cosine down to almost nothing. Every array is (N, ...); each epoch visits all N rows once, in a new
    order, in batches of nearly equal size that are at most `batch_size`. `module` moves to `device`, is in training
    mode meanwhile and in evaluation mode afterwards; parameters that require no gradient stay as they are.

    The same seed, device and thread count give the same weights. Random numbers that `module` or `loss` draw from
    torch's global generators are seeded here, and the caller's state of those generators is put back.

    Raises: UsageError for arrays or settings that cannot be trained on, and for a loss that is not finite (it
    names the step; the weights are then those before that step).

    Source: Loshchilov & Hutter 2019 (AdamW); Smith & Topin 2018 (one cycle).
    """
    device = torch.device(device)
    rows = _row_count(arrays)
    parameters = _trainable(module)
    if epochs < 1 or batch_size < 1 or not lr > 0:
        raise UsageError(f"training: epochs={epochs} and batch_size={batch_size} must be at least 1, lr={lr} above 0")
    batches = math.ceil(rows / batch_size)
    steps = epochs * batches
    module.to(device).train()
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    history: list[float] = []
    step = 0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)  # of its own, so that the order is the same on every device
        for _ in range(epochs):
            total = 0.0
            for index in torch.randperm(rows, generator=order).tensor_split(batches):
                for group in optimizer.param_groups:
                    group["lr"] = lr * _one_cycle(step / steps)
                step += 1
                value = loss(module, *(array[index].to(device) for array in arrays))
                number = _finite(float(value.detach()), step, steps, lr)
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                if max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, max_grad_norm)
                optimizer.step()
                total += number * len(index)
                if on_step is not None:
                    on_step(step, steps, number)
            history.append(total / rows)
    module.zero_grad()
    module.eval()
    return history


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise UsageError("training: the module has no parameter that requires a gradient, so there is nothing to train")
    return parameters


def _finite(loss: float, step: int, steps: int, lr: float) -> float:
    if not math.isfinite(loss):
        raise UsageError(
            f"training: the loss is {loss} at step {step} of {steps}; "
            f"check the data for NaN, or lower the learning rate (it is {lr})"
        )
    return loss


def _row_count(arrays: Sequence[Tensor]) -> int:
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or 0 in lengths:
        shapes = ", ".join(str(tuple(array.shape)) for array in arrays) or "none"
        raise UsageError(f"training: arrays need the same number of rows, at least one; given shapes: {shapes}")
    return lengths.pop()


def _one_cycle(progress: float, warm_up: float = 0.2, floor: float = 1e-3) -> float:
    """Learning rate as a share of its peak: a line from a tenth up to 1, then a cosine down to `floor`."""
    if progress < warm_up:
        return 0.1 + 0.9 * progress / warm_up
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
