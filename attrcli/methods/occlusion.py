"""Occlusion."""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from attrcli.errors import UsageError
from attrcli.methods._method import Attribution, column, require_baseline
from attrcli.model import Model, Target

Window = tuple[slice, ...]


@dataclass(frozen=True)
class Occlusion:
    """A_i = mean over the windows w that cover i of f(x) - f(x with w replaced by the baseline).

    A window covers all channels; windows start at multiples of the stride, and the last one is clipped at the border.
    Forward passes only, so an ONNX file runs in ONNX Runtime.
    """

    paper: ClassVar[str] = "Zeiler and Fergus 2014, arXiv 1311.2901 (section 4.2)"
    cost: ClassVar[str] = "1 + (number of windows) forward"
    needs: ClassVar[frozenset[str]] = frozenset({"baseline"})
    gives: ClassVar[frozenset[str]] = frozenset()
    axioms: ClassVar[frozenset[str]] = frozenset({"linear", "batch_exact"})

    patch: int | Literal["auto"] = "auto"
    """Side of the window in elements; auto: an eighth of the shorter side, 1 for a table."""
    stride: int | Literal["auto"] = "auto"
    """Distance of two windows, at most the patch; auto: half the patch."""

    def __post_init__(self) -> None:
        """Raises UsageError for values out of range."""
        for name, value in (("patch", self.patch), ("stride", self.stride)):
            if value != "auto" and value < 1:
                raise UsageError(f"occlusion: {name}={value} must be at least 1")
        if self.patch != "auto" and self.stride != "auto" and self.stride > self.patch:
            raise UsageError(f"occlusion: stride={self.stride} is larger than patch={self.patch} and leaves gaps")

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One forward pass per window, and one for the input."""
        return 1 + len(self.windows(shape)), 0

    def windows(self, shape: tuple[int, ...]) -> list[Window]:
        """The windows of one sample: slices over (C, ...), or over (F,) of a table."""
        space = shape if len(shape) == 1 else shape[1:]
        automatic = 1 if len(shape) == 1 else max(1, min(space) // 8)
        patch = automatic if self.patch == "auto" else self.patch
        stride = max(1, patch // 2) if self.stride == "auto" else self.stride
        if stride > patch:
            raise UsageError(f"occlusion: stride={stride} is larger than the patch, {patch}, and leaves gaps")
        starts = [range(max(1, math.ceil((size - patch) / stride) + 1)) for size in space]
        channels = () if len(shape) == 1 else (slice(None),)
        return [
            (*channels, *(slice(k * stride, min(k * stride + patch, size)) for k, size in zip(at, space, strict=True)))
            for at in itertools.product(*starts)
        ]

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Score every masked input, pass by pass, and spread each fall over its window."""
        baseline = require_baseline("occlusion", inputs, baseline)
        windows = self.windows(tuple(inputs.shape[1:]))
        score = model.scores(inputs, target)
        fall = torch.zeros(len(inputs), len(windows), dtype=torch.float64, device=inputs.device)
        for rows in model.passes(len(inputs) * len(windows)):
            sample, window = rows // len(windows), rows % len(windows)
            masked = inputs[sample]
            for row, (s, w) in enumerate(zip(sample.tolist(), window.tolist(), strict=True)):
                masked[row][windows[w]] = baseline[s][windows[w]]
            fall[sample, window] = score[sample] - model.scores(masked, target.take(sample))
        total = torch.zeros_like(inputs, dtype=torch.float64)
        count = torch.zeros(inputs.shape[1:], dtype=torch.float64, device=inputs.device)
        for number, place in enumerate(windows):
            block = total[(slice(None), *place)]
            block += column(fall[:, number], total)
            count[place] += 1
        return Attribution(total / count)
