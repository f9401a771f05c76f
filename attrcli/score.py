"""The scalar that is explained: which output unit, on which scale, for each row of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from attrcli.errors import UsageError
from attrcli.graph.passes import Head

__all__ = ["ADDITIVE", "SCORES", "Head", "Score", "Target", "apply_head", "select", "undo_head"]

Score = Literal["logit", "centred", "prob", "logprob", "margin"]
SCORES: tuple[Score, ...] = ("logit", "centred", "prob", "logprob", "margin")
ADDITIVE: tuple[Score, ...] = ("logit", "centred")
"""Scores that are linear in the logits, for methods whose differences add up to those."""


@dataclass(frozen=True)
class Target:
    """What is explained, row by row of a batch of N.

    `index` (N,) selects the class: the first dimension of the output after the batch; `minus` (N,) is a class to
    subtract; `weight` (N, P) weighs the P positions that remain (default: their sum). `sign` (N,) is -1 where the
    complement of a single sigmoid output is meant. `seed` (N,) seeds whatever a method draws for that sample; `held`
    are values of the model's other inputs, row by row. Raises UsageError for an unknown score.
    """

    index: torch.Tensor
    score: Score = "logit"
    minus: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    sign: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    held: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UsageError(f"unknown score {self.score!r}; accepted: {', '.join(SCORES)}")

    def take(self, rows: torch.Tensor) -> "Target":
        """The targets of these rows, which may repeat."""

        def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[rows.to(tensor.device)]

        return replace(
            self,
            index=self.index[rows.to(self.index.device)],
            minus=pick(self.minus),
            weight=pick(self.weight),
            sign=pick(self.sign),
            seed=pick(self.seed),
            held={name: tensor[rows.to(tensor.device)] for name, tensor in self.held.items()},
        )


def select(logits: torch.Tensor, target: Target, head: Head) -> torch.Tensor:
    """The scores (N,) that a target selects from logits (N,), (N, K) or (N, K, ...).

    logit: z_c. centred: z_c - mean over the classes of z. prob: softmax(z)_c, sigmoid for a sigmoid head or a single
    unit. logprob: its logarithm. margin: z_c - max over the other classes. With `minus`, the same of that class
    is subtracted.
    Raises UsageError for a margin of a single class, or one centred on itself.
    """
    values = logits.reshape(len(logits), 1 if logits.dim() == 1 else logits.shape[1], -1)
    if target.sign is not None:
        values = values * target.sign.to(values.dtype)[:, None, None]
    scaled = _scale(values, target.score, head)
    index = target.index[:, None, None].expand(-1, 1, values.shape[2])
    picked = _picked(scaled, index, target.score)
    if target.minus is not None:
        picked = picked - _picked(scaled, target.minus[:, None, None].expand_as(index), target.score)
    if target.weight is not None:
        picked = picked * target.weight.to(picked.dtype)
    return picked.sum(1)


def _picked(values: torch.Tensor, index: torch.Tensor, score: Score) -> torch.Tensor:
    """The class at `index` (N, 1, P) of values (N, K, P); for margin, less the best of the others."""
    picked = values.gather(1, index)[:, 0]
    return picked - values.scatter(1, index, float("-inf")).amax(1) if score == "margin" else picked


def _scale(values: torch.Tensor, score: Score, head: Head) -> torch.Tensor:
    if score == "logit":
        return values
    single = values.shape[1] == 1
    if single and score in ("margin", "centred"):
        raise UsageError(f"--score {score} needs at least two classes; this output has one")
    if score == "margin":
        return values
    if score == "centred":
        return values - values.mean(1, keepdim=True)
    sigmoid = head == "sigmoid" or single
    if score == "prob":
        return values.sigmoid() if sigmoid else values.softmax(1)
    return torch.nn.functional.logsigmoid(values) if sigmoid else values.log_softmax(1)


def apply_head(logits: torch.Tensor, head: Head) -> torch.Tensor:
    """Logits to what the file itself outputs."""
    if head == "softmax":
        return logits.softmax(1)
    if head == "log_softmax":
        return logits.log_softmax(1)
    return logits.sigmoid() if head == "sigmoid" else logits


def undo_head(outputs: torch.Tensor, head: Head) -> torch.Tensor:
    """What a file outputs to logits; after a softmax up to a constant per sample, which no softmax tells."""
    limits = torch.finfo(outputs.dtype)
    if head == "softmax":
        return outputs.clamp_min(limits.tiny).log()
    return outputs.logit(limits.eps) if head == "sigmoid" else outputs
