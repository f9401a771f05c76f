"""Integrated gradients."""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch

from attrcli.errors import AttrcliWarning, UsageError
from attrcli.methods._method import Attribution, add_rows, column, require_baseline
from attrcli.model import Model, Target

FIRST = 25
"""Steps that steps=auto starts with."""

MOST = 4000
"""Most steps: the nodes of Gauss-Legendre quadrature are the eigenvalues of a matrix of steps x steps."""

ROUNDING = 8
"""Units in the last place of the two scores below which steps=auto cannot tell a gap from rounding."""


@dataclass(frozen=True)
class IntegratedGradients:
    """A_i = (x_i - x'_i) * integral over alpha in [0, 1] of df/dx_i at x' + alpha (x - x').

    Sums to f(x) - f(x') up to the error of the quadrature; with steps=auto the number of steps is doubled, for each
    sample alone, until that gap is small enough, or no larger than the rounding of the two scores. A note per sample
    says how many steps it took and which of the two it was.
    """

    paper: ClassVar[str] = "Sundararajan et al. 2017, arXiv 1703.01365 (equation 1)"
    cost: ClassVar[str] = "steps x (1 forward + 1 backward)"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "baseline"})
    gives: ClassVar[frozenset[str]] = frozenset({"multipliers"})
    axioms: ClassVar[frozenset[str]] = frozenset({"complete", "dummy", "linear", "batch_exact"})

    steps: int | Literal["auto"] = 50
    """Points on the path; auto refines each sample until its gap is within the tolerance."""
    rule: Literal["gausslegendre", "trapezoid"] = "gausslegendre"
    """Quadrature; trapezoid takes both ends of the path, at half weight."""
    tolerance: float = 0.01
    """For steps=auto: largest gap, as a fraction of max(|delta|, 1e-3 of the sum of |attribution|)."""
    max_steps: int = 1600
    """For steps=auto: the most steps; a sample that needs more keeps these, with a warning and a note."""

    def __post_init__(self) -> None:
        """Raises UsageError for values out of range."""
        least = 2 if self.rule == "trapezoid" else 1
        if self.steps != "auto" and self.steps < least:
            raise UsageError(f"integrated_gradients: steps={self.steps} must be at least {least} for rule={self.rule}")
        if self.steps != "auto" and self.steps > MOST:
            raise UsageError(f"integrated_gradients: steps={self.steps} must be at most {MOST}")
        if not 0 < self.tolerance < 1:
            raise UsageError(f"integrated_gradients: tolerance={self.tolerance} must lie between 0 and 1")
        if self.max_steps < FIRST:
            raise UsageError(f"integrated_gradients: max_steps={self.max_steps} must be at least {FIRST}")

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each per step; for steps=auto the fewest there can be, and the scores at both ends."""
        if self.steps != "auto":
            return self.steps, self.steps
        return FIRST + 2, FIRST

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Integrate, at a fixed number of steps or until each sample's gap is within the tolerance."""
        baseline = require_baseline("integrated_gradients", inputs, baseline)
        if self.steps == "auto":
            return self._refine(model, inputs, target, baseline)
        slopes = self._integrate(model, inputs, target, baseline, self.steps)
        return Attribution(slopes * (inputs - baseline), multipliers=slopes)

    def _refine(self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor) -> Attribution:
        """Double the steps of the samples whose gap is too large; each sample's note says how many it took."""
        score, reference = model.scores(inputs, target), model.scores(baseline, target)
        rounding = ROUNDING * torch.finfo(inputs.dtype).eps * (score.abs() + reference.abs())
        values = torch.zeros_like(inputs, dtype=torch.float64)
        slopes = torch.zeros_like(values)
        notes = [""] * len(inputs)
        rows, steps = torch.arange(len(inputs), device=inputs.device), FIRST
        while True:
            slopes[rows] = self._integrate(model, inputs[rows], target.take(rows), baseline[rows], steps)
            part = values[rows] = slopes[rows] * (inputs - baseline)[rows]
            total, size, delta = part.flatten(1).sum(1), part.flatten(1).abs().sum(1), (score - reference)[rows]
            gap = (total - delta).abs()
            reached = gap <= self.tolerance * torch.maximum(delta.abs(), 1e-3 * size)
            rounded = ~reached & (gap <= rounding[rows])
            for row, within, noise in zip(rows.tolist(), reached.tolist(), rounded.tolist(), strict=True):
                why = "" if within else " (gap within rounding)" if noise else " (tolerance missed)"
                notes[row] = f"steps={steps}{why}"
            rows = rows[~(reached | rounded)]
            if not len(rows) or steps == self.max_steps:
                break
            steps = min(2 * steps, self.max_steps)
        if len(rows):
            warnings.warn(
                f"integrated_gradients: {len(rows)} of {len(inputs)} samples still miss the tolerance "
                f"{self.tolerance:g} at {steps} steps: raise max_steps or see /completeness_delta",
                AttrcliWarning,
                stacklevel=2,
            )
        return Attribution(values, note=tuple(notes), multipliers=slopes)

    def _integrate(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor, steps: int
    ) -> torch.Tensor:
        """The mean gradient on each sample's path, (N, ...) float64: rows of all (sample, step) pairs, pass by pass."""
        nodes, weights = (torch.from_numpy(part).to(inputs.device) for part in quadrature(self.rule, steps))
        difference = inputs - baseline
        total = torch.zeros_like(inputs, dtype=torch.float64)
        for rows in model.passes(len(inputs) * steps):
            sample, step = rows // steps, rows % steps
            # Not addcmul: fused, it rounds unlike the formula, and near a kink the last bit decides.
            points = baseline[sample] + column(nodes[step], inputs) * difference[sample]
            gradient, _ = model.gradient(points, target.take(sample))
            add_rows(total, sample, gradient * column(weights[step], gradient))
        return total


@cache
def quadrature(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1], float64 (S,); the weights sum to one."""
    if rule == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return (nodes + 1) / 2, weights / 2
    if rule == "trapezoid":
        weights = np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, steps), weights
    raise UsageError(f"integrated_gradients: rule={rule} must be gausslegendre or trapezoid")
