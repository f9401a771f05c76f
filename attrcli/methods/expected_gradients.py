"""Expected gradients."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from attrcli.errors import UsageError
from attrcli.methods._method import Attribution, add_rows, column
from attrcli.model import Model, Target


@dataclass(frozen=True)
class ExpectedGradients:
    """A_i = mean over references x' and alpha of (x_i - x'_i) df/dx_i at x' + alpha (x - x').

    The references are the set of --baseline, each taken equally often, at the midpoints of equal steps of alpha. Sums
    to f(x) - mean f(x') up to the error of the midpoint rule, exactly where the score is quadratic. With noise the
    gradient is taken beside the path, as GradientSHAP does, and the sum is off by as much as the noise makes. The
    standard error is that of the mean over the references.
    """

    paper: ClassVar[str] = "Erion et al. 2021, arXiv 1906.10670 (equation 3); GradientSHAP: Lundberg and Lee 2017"
    cost: ClassVar[str] = "baselines x steps x (1 forward + 1 backward)"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "baselines"})
    gives: ClassVar[frozenset[str]] = frozenset({"standard_error"})
    axioms: ClassVar[frozenset[str]] = frozenset({"complete", "dummy", "linear", "batch_exact"})

    steps: int = 10
    """Points between each reference and the input."""
    noise: float = 0.0
    """Standard deviation of noise added to the points, as a fraction of each sample's own range (GradientSHAP)."""

    def __post_init__(self) -> None:
        """Raises UsageError for values out of range."""
        if self.steps < 1:
            raise UsageError(f"expected_gradients: steps={self.steps} must be at least 1")
        if not 0 <= self.noise < float("inf"):
            raise UsageError(f"expected_gradients: noise={self.noise} must be finite and not negative")
        if self.noise:  # gradients beside the path add up to no difference
            object.__setattr__(self, "axioms", self.axioms - {"complete"})

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each per step."""
        return self.steps, self.steps

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Mean and standard error over references (N, R, ...), from the mean gradient of each (sample, reference)."""
        if baseline is None or baseline.dim() != inputs.dim() + 1 or baseline.shape[1] < 2:
            raise UsageError(
                "expected_gradients is a mean over a set of at least 2 baselines: give --baseline a directory, or a "
                "file of several inputs; with one baseline it is integrated_gradients"
            )
        count, total = baseline.shape[1], torch.zeros(inputs.shape, dtype=torch.float64, device=inputs.device)
        squares = torch.zeros_like(total)
        drawn = self._noise(inputs, target, count)
        for number in range(count):
            reference = baseline[:, number]
            contributions = self._slopes(model, inputs, target, reference, drawn) * (inputs - reference)
            total += contributions
            squares += contributions.square()
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0) * count / (count - 1)
        return Attribution(mean, standard_error=(variance / count).sqrt())

    def _slopes(
        self,
        model: Model,
        inputs: torch.Tensor,
        target: Target,
        reference: torch.Tensor,
        drawn: list[Iterator[torch.Tensor]],
    ) -> torch.Tensor:
        """The mean gradient between one reference and the input, (N, ...) float64, pass by pass."""
        total = torch.zeros(inputs.shape, dtype=torch.float64, device=inputs.device)
        for rows in model.passes(len(inputs) * self.steps):
            sample, step = rows // self.steps, rows % self.steps
            alpha = column((step.double() + 0.5) / self.steps, inputs)
            points = reference[sample] + alpha * (inputs - reference)[sample]
            if self.noise:
                points = points + torch.stack([next(drawn[row]) for row in sample.tolist()]).to(points)
            gradient, _ = model.gradient(points, target.take(sample))
            add_rows(total, sample, gradient)
        return total / self.steps

    def _noise(self, inputs: torch.Tensor, target: Target, count: int) -> list[Iterator[torch.Tensor]]:
        """A stream of draws for each sample, by its seed alone; each draw is made by itself, whatever the passes."""
        seeds = [0] * len(inputs) if target.seed is None else target.seed.tolist()
        spread = self.noise * (inputs.flatten(1).amax(1) - inputs.flatten(1).amin(1)).double().cpu()

        def stream(seed: int, scale: torch.Tensor) -> Iterator[torch.Tensor]:
            generator = torch.Generator().manual_seed(seed)
            for _ in itertools.repeat(None, count * self.steps):
                yield scale * torch.randn(inputs.shape[1:], generator=generator, dtype=torch.float64)

        return [stream(seed, scale) for seed, scale in zip(seeds, spread, strict=True)]
