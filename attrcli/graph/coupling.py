"""Whether the rows of a batch influence each other, found by running the model."""

from collections.abc import Callable, Sequence

import torch

Row = tuple[tuple[int, ...], torch.dtype]
"""Shape of one row of an input, and its type."""


def coupled(run: Callable[..., torch.Tensor], inputs: Sequence[Row], device: torch.device) -> bool:
    """Whether the first row of a batch of two comes out otherwise when the second row is another.

    The batch keeps its size, hence its kernels, so that a row which stands for itself keeps its bits. A model that
    fails on small inputs, or is not finite there, counts as not coupled.
    """
    first, *others = ([_row(shape, dtype, scale).to(device) for shape, dtype in inputs] for scale in (1, 0, 10))
    try:
        with torch.no_grad():
            one, two = (run(*map(torch.cat, zip(first, other, strict=True)))[0].double() for other in others)
    except (RuntimeError, IndexError):
        return False
    if not bool(torch.isfinite(one).all()):
        return False
    return not torch.allclose(one, two, rtol=0, atol=1e-6 * float(one.abs().max()))


def _row(shape: Sequence[int], dtype: torch.dtype, scale: int) -> torch.Tensor:
    """One row of numbers below `scale`; of zeros or ones where whole numbers are wanted."""
    if not dtype.is_floating_point:
        return torch.full((1, *shape), min(scale, 1)).to(dtype)
    return scale * torch.rand((1, *shape), generator=torch.Generator().manual_seed(scale)).to(dtype)
