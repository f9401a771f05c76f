"""Layer-wise relevance propagation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from attrcli.errors import UsageError
from attrcli.graph.rules import Ruled, merges_batch, own
from attrcli.methods._lrp_bounds import Box
from attrcli.methods._lrp_rules import COMPOSITES, Rules
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target


@dataclass(frozen=True)
class Lrp:
    """R(output) = score, handed back layer by layer: each op divides what it is given among its inputs.

    Convolutions, dense layers and first layers have the rules that `composite` names; batch norm is folded first.
    Activations pass relevance on, sums and residual additions divide it in proportion, a max pool gives it to the
    winner, a gate leaves it to what it gates. What biases, constants and stabilisers absorb is the remainder: with it,
    relevances sum to the score. A negative score flips every sign. An op without a rule is refused.
    """

    paper: ClassVar[str] = "Bach et al. 2015, PLoS ONE 10(7); composites: Montavon et al. 2019; Anders et al. 2021"
    cost: ClassVar[str] = "1 forward + 1 backward, and up to 4 of each for single layers, as the composite has it"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "rules"})
    gives: ClassVar[frozenset[str]] = frozenset()
    axioms: ClassVar[frozenset[str]] = frozenset({"conservative", "batch_exact"})

    composite: Literal[
        "epsilon",
        "epsilon_plus",
        "epsilon_plus_flat",
        "epsilon_plus_wsquare",
        "epsilon_gamma",
        "epsilon_gamma_box",
        "epsilon_alpha2_beta1",
        "epsilon_alpha2_beta1_flat",
        "deep_taylor",
    ] = "epsilon_plus_flat"
    """Rules of dense layers, of convolutions (plus: z+; alpha2_beta1), and of first layers (flat, wsquare, box: z-box,
    by the range of the pixels); deep_taylor is z+ everywhere, z-box first; epsilon is the epsilon rule everywhere."""
    epsilon: float = 1e-6
    """Added to every denominator, with its sign."""
    gamma: float = 0.25
    """How much more contributions of the sign of the output weigh, in composites with gamma."""
    attention: Literal["refuse", "attnlrp", "cp"] = "refuse"
    """Through attention, softmax, layer and group norms: attnlrp, or cp, which holds the attention weights constant."""

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise UsageError(f"lrp: epsilon={self.epsilon:g}; accepted: a positive number, 1e-6 say")
        if self.gamma < 0:
            raise UsageError(f"lrp: gamma={self.gamma:g}; accepted: zero or a positive number, 0.25 say")

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Those of the whole net."""
        return 1, 1

    def ruled(self, model: Model, inputs: torch.Tensor) -> Ruled:
        """The graph under LRP's rules. Raises UnsupportedOp for an op without one, UsageError for lack of bounds."""
        box = Box(model, tuple(inputs.shape[1:]), self.composite)
        rules = Rules(COMPOSITES[self.composite], self.epsilon, self.gamma, self.attention, box)
        advice = "methods that need no rules: integrated_gradients, gradient, occlusion"
        return model.ruled(inputs, rules, "lrp", advice, norms="folded")

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Propagate the score to the input. Raises UnsupportedOp for an op without a rule."""
        if target.score != "logit":
            raise UsageError(f"lrp explains logits, which relevances add up to; --score {target.score} is no logit")
        ruled = self.ruled(model, inputs)
        run = _started(ruled, ruled.module.meta["inputs"].index(model.input))
        alone = merges_batch(ruled.module, ruled.varying)  # else nothing tells the rows of the remainder apart
        values, remainders = [], []
        for rows in torch.arange(len(inputs))[:, None] if alone else model.passes(len(inputs)):
            values.append(model.gradient(inputs[rows], target.take(rows), ruled=run)[0])
            remainders.append(ruled.remainder(len(rows)))
        return Attribution(torch.cat(values), remainder=torch.cat(remainders))


def _started(ruled: Ruled, place: int) -> Callable[..., Any]:
    """The graph with the value of each output as its relevance; without one that moves, all of it is remainder."""

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor]:
        (value,) = ruled(*inputs)
        explained, book, held = inputs[place], ruled.remainders[-1], value.detach()

        def backward(asked: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
            if not value.requires_grad:
                book.total += book.by_row(asked * held)
            return asked * held, torch.zeros_like(explained)

        return (own(held, [value, explained], backward),)

    return run
