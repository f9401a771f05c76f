"""DeepLIFT."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from attrcli.errors import UsageError
from attrcli.graph.rules import Choice, Ruled
from attrcli.methods._deeplift_cancel import Cancelling
from attrcli.methods._deeplift_integral import noted
from attrcli.methods._deeplift_rules import Choosing
from attrcli.methods._method import Attribution, require_baseline
from attrcli.model import Model, Target
from attrcli.score import ADDITIVE

_ADVICE = "-o fallback=integrate averages the op's own derivative, and integrated_gradients needs no rules"


@dataclass(frozen=True)
class DeepLift:
    """C_i = m_i (x_i - x'_i): differences from the baseline, handed back through multipliers in place of gradients.

    Sums to f(x) - f(x') on every graph. Each op has its own rule: the quotient of differences for activations
    (Rescale, or RevealCancel), half and half for products, the two winners of a max pool; norms, softmax and attention
    are taken apart. What an op decides by comparing (a mask, an order) is not attributed but booked as remainder. An
    op without a rule is refused.
    """

    paper: ClassVar[str] = "Shrikumar et al. 2017, arXiv 1704.02685 (section 3)"
    cost: ClassVar[str] = "1 forward + 1 backward, and 1 forward for each distinct baseline"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "baseline", "rules"})
    gives: ClassVar[frozenset[str]] = frozenset({"multipliers"})
    axioms: ClassVar[frozenset[str]] = frozenset({"complete", "dummy", "linear", "batch_exact"})

    rule: Literal["rescale", "revealcancel", "genomics"] = "rescale"
    """What an activation passes on: the quotient of differences; or (revealcancel) its change shared out between the
    positive and the negative differences that reach it through the linear op before; genomics does the latter after
    dense layers, the former after convolutions."""
    fallback: Literal["refuse", "integrate"] = "refuse"
    """What becomes of an op without a rule, and of a division by what nearly vanishes at the baseline: integrate takes
    the op's own derivative, averaged between its arguments at the baseline and at the input, and the note of each
    input says where."""
    output: Literal["contribution", "multiplier"] = "contribution"
    """multiplier: m_i itself, not multiplied by the difference; it does not add up to anything."""

    def __post_init__(self) -> None:
        if self.output == "multiplier":  # it sums to nothing
            object.__setattr__(self, "axioms", self.axioms - {"complete"})

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each; the baseline's pass is shared."""
        return 1, 1

    def ruled(self, model: Model, inputs: torch.Tensor) -> Ruled:
        """The graph under DeepLIFT's rules. Raises UnsupportedOp for an op without one."""
        return model.ruled(inputs, self._choice(), "deeplift", _ADVICE)

    def _choice(self) -> Choice:
        """The rules for a new graph."""
        rescale = Choosing(integrates=self.fallback == "integrate")
        return rescale if self.rule == "rescale" else Cancelling(rescale, self.rule == "genomics")

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Propagate multipliers from the score to the input. Raises UnsupportedOp for an op without a rule."""
        baseline = require_baseline("deeplift", inputs, baseline)
        if target.score not in ADDITIVE:
            raise UsageError(
                f"deeplift explains logits, whose differences add up; --score {target.score} is no logit; accepted: "
                + ", ".join(ADDITIVE)
            )
        ruled = self.ruled(model, inputs)
        shared = not target.held and model.broadcasts(inputs) and bool((baseline == baseline[:1]).all())
        parts, remainders, notes = [], [], list[str]()
        for rows in model.passes(len(inputs)):
            references = baseline[:1] if shared else baseline[rows]
            multipliers, _ = model.gradient(inputs[rows], target.take(rows), ruled=ruled, references=references)
            parts.append(multipliers)
            notes += [noted(marks) for marks in ruled.marks(len(rows))]
            remainders.append(ruled.remainder(len(rows)))
        multipliers = torch.cat(parts)
        values = multipliers if self.output == "multiplier" else multipliers * (inputs - baseline)
        return Attribution(values, remainder=torch.cat(remainders), note=tuple(notes), multipliers=multipliers)
