"""SmoothGrad, SmoothGrad-squared and VarGrad."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from attrcli.errors import UsageError
from attrcli.methods._method import Attribution, add_rows, column
from attrcli.model import Model, Target


@dataclass(frozen=True)
class SmoothGrad:
    """Gradients g at noisy copies x + e, e ~ N(0, (noise * (max x - min x))^2), reduced over the copies.

    mean: E g (SmoothGrad). squared: E g^2 (SmoothGrad-squared). variance: E g^2 - (E g)^2 (VarGrad). The noise of a
    sample depends on the seed and its id alone, and comes in pairs +e, -e: the mean is then exact where the score is
    quadratic.
    """

    paper: ClassVar[str] = "Smilkov et al. 2017, arXiv 1706.03825; Adebayo et al. 2018, arXiv 1810.03307 (VarGrad)"
    cost: ClassVar[str] = "samples x (1 forward + 1 backward)"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    axioms: ClassVar[frozenset[str]] = frozenset({"dummy", "batch_exact"})

    samples: int = 50
    """Noisy copies per sample; even, since noise comes in pairs."""
    noise: float = 0.15
    """Standard deviation of the noise, as a fraction of each sample's own range."""
    reduce: Literal["mean", "squared", "variance"] = "mean"
    """What is taken over the copies."""

    def __post_init__(self) -> None:
        """Raises UsageError for values out of range."""
        if self.samples < 2 or self.samples % 2:
            raise UsageError(f"smoothgrad: samples={self.samples} must be even and at least 2")
        if not self.noise >= 0:
            raise UsageError(f"smoothgrad: noise={self.noise} must not be negative")

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each per copy."""
        return self.samples, self.samples

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Accumulate g and g^2 in float64 over the copies."""
        low, high = inputs.flatten(1).amin(1), inputs.flatten(1).amax(1)
        spread = column(self.noise * (high - low), inputs)
        first = torch.zeros_like(inputs, dtype=torch.float64)
        second = torch.zeros_like(first)
        for sample in range(len(inputs)):  # one at a time: the noise of a whole batch would not fit
            generator = torch.Generator().manual_seed(0 if target.seed is None else int(target.seed[sample]))
            for start in range(0, self.samples // 2, max(1, model.rows // 2)):
                pairs = min(max(1, model.rows // 2), self.samples // 2 - start)
                drawn = torch.randn(pairs, *inputs.shape[1:], generator=generator, dtype=torch.float64)
                noise = drawn.to(inputs) * spread[sample]
                points = inputs[sample] + torch.cat([noise, -noise])
                rows = torch.full((len(points),), sample, device=inputs.device)
                gradient, _ = model.gradient(points, target.take(rows))
                add_rows(first, rows, gradient)
                if self.reduce != "mean":
                    add_rows(second, rows, gradient.double().square())
        mean = first / self.samples
        if self.reduce == "mean":
            return Attribution(mean)
        squared = second / self.samples
        return Attribution(squared if self.reduce == "squared" else (squared - mean.square()).clamp_min(0))
