"""SmoothGrad, SmoothGrad-squared and VarGrad."""

import itertools
from collections.abc import Iterator
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
    gives: ClassVar[frozenset[str]] = frozenset()
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
        if not 0 <= self.noise < float("inf"):
            raise UsageError(f"smoothgrad: noise={self.noise} must be finite and not negative")

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each per copy."""
        return self.samples, self.samples

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Accumulate g and g^2 in float64 over the copies, pass by pass over all (sample, copy) pairs."""
        low, high = inputs.flatten(1).amin(1), inputs.flatten(1).amax(1)
        spread = column(self.noise * (high - low), inputs)
        seeds = [0] * len(inputs) if target.seed is None else target.seed.tolist()
        noise = itertools.chain.from_iterable(self._noise(seed, inputs.shape[1:]) for seed in seeds)
        first = torch.zeros_like(inputs, dtype=torch.float64)
        second = torch.zeros_like(first)
        for rows in model.passes(len(inputs) * self.samples):
            sample = rows // self.samples
            drawn = torch.stack(list(itertools.islice(noise, len(rows)))).to(inputs)
            gradient, _ = model.gradient(torch.addcmul(inputs[sample], drawn, spread[sample]), target.take(sample))
            add_rows(first, sample, gradient)
            if self.reduce != "mean":
                add_rows(second, sample, gradient.double().square())
        mean, squared = first / self.samples, second / self.samples
        reduced = {"mean": mean, "squared": squared, "variance": (squared - mean.square()).clamp_min(0)}
        return Attribution(reduced[self.reduce])

    def _noise(self, seed: int, shape: torch.Size) -> Iterator[torch.Tensor]:
        """+e, -e, ... of one sample; each e is a draw of its own, so that the size of a pass changes none."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.samples // 2):
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            yield drawn
            yield -drawn
