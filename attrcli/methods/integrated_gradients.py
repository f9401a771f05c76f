"""Integrated gradients."""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch

from attrcli.errors import AttrcliWarning, UsageError
from attrcli.methods._method import Attribution, add_rows, column
from attrcli.model import Model, Target


@dataclass(frozen=True)
class IntegratedGradients:
    """A_i = (x_i - x'_i) * integral over alpha in [0, 1] of df/dx_i at x' + alpha (x - x').

    Sums to f(x) - f(x') up to the error of the quadrature; with steps=auto the number of steps is doubled, for each
    sample alone, until that gap is small enough.
    """

    paper: ClassVar[str] = "Sundararajan et al. 2017, arXiv 1703.01365 (equation 1)"
    cost: ClassVar[str] = "steps x (1 forward + 1 backward)"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "baseline"})
    axioms: ClassVar[frozenset[str]] = frozenset({"complete", "dummy", "linear", "batch_exact"})

    steps: int | Literal["auto"] = 50
    """Points on the path; auto refines each sample until its gap is within the tolerance."""
    rule: Literal["gausslegendre", "trapezoid"] = "gausslegendre"
    """Quadrature; trapezoid takes both ends of the path, at half weight."""
    tolerance: float = 0.01
    """For steps=auto: largest gap, as a fraction of max(|delta|, 1e-3 of the sum of |attribution|)."""
    max_steps: int = 1600
    """For steps=auto: where to stop, with a warning."""

    def __post_init__(self) -> None:
        """Raises UsageError for values out of range."""
        least = 2 if self.rule == "trapezoid" else 1
        if self.steps != "auto" and self.steps < least:
            raise UsageError(f"integrated_gradients: steps={self.steps} must be at least {least} for rule={self.rule}")
        if not 0 < self.tolerance < 1:
            raise UsageError(f"integrated_gradients: tolerance={self.tolerance} must lie between 0 and 1")
        if self.max_steps < 25:
            raise UsageError(f"integrated_gradients: max_steps={self.max_steps} must be at least 25")

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each per step; for steps=auto the fewest there can be."""
        steps = 25 if self.steps == "auto" else self.steps
        return steps, steps

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Integrate, at a fixed number of steps or until each sample's gap is within the tolerance."""
        assert baseline is not None
        if self.steps != "auto":
            return Attribution(self._integrate(model, inputs, target, baseline, self.steps))
        delta = model.scores(inputs, target) - model.scores(baseline, target)
        values = torch.zeros_like(inputs, dtype=torch.float64)
        taken = torch.zeros(len(inputs), dtype=torch.long)
        open_rows, steps = torch.arange(len(inputs), device=inputs.device), 25
        while len(open_rows) and steps <= self.max_steps:
            part = self._integrate(model, inputs[open_rows], target.take(open_rows), baseline[open_rows], steps)
            values[open_rows], taken[open_rows.cpu()] = part, steps
            flat = part.flatten(1)
            gap = (flat.sum(1) - delta[open_rows]).abs()
            accepted = self.tolerance * torch.maximum(delta[open_rows].abs(), 1e-3 * flat.abs().sum(1))
            open_rows = open_rows[gap > accepted]
            steps *= 2
        if len(open_rows):
            warnings.warn(
                f"integrated_gradients: {len(open_rows)} of {len(inputs)} samples still miss the tolerance "
                f"{self.tolerance:g} at {int(taken.max())} steps: raise max_steps or see /completeness_delta",
                AttrcliWarning,
                stacklevel=2,
            )
        missed = set(open_rows.tolist())
        note = tuple(
            f"steps={n}" + (" (tolerance missed)" if i in missed else "") for i, n in enumerate(taken.tolist())
        )
        return Attribution(values, note=note)

    def _integrate(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor, steps: int
    ) -> torch.Tensor:
        """The integral of all samples, (N, ...) float64: rows of all (sample, step) pairs, pass by pass."""
        nodes, weights = (torch.from_numpy(part).to(inputs.device) for part in quadrature(self.rule, steps))
        difference = inputs - baseline
        total = torch.zeros_like(inputs, dtype=torch.float64)
        for rows in model.passes(len(inputs) * steps):
            sample, step = rows // steps, rows % steps
            points = torch.addcmul(baseline[sample], difference[sample], column(nodes[step], inputs))
            gradient, _ = model.gradient(points, target.take(sample))
            add_rows(total, sample, gradient.mul_(column(weights[step], gradient)))
        return total * difference


@cache
def quadrature(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1], float64 (S,); the weights sum to one."""
    if rule == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return (nodes + 1) / 2, weights / 2
    nodes = np.linspace(0, 1, steps)
    weights = np.full(steps, 1 / (steps - 1))
    weights[[0, -1]] /= 2
    return nodes, weights
