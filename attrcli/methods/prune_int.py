"""PruneInt (NeuronIntGrad)."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from attrcli.errors import UsageError
from attrcli.graph.rules import Ruled
from attrcli.methods import _pruning as pruning
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target


@dataclass(frozen=True)
class PruneInt:
    """As prune_grad, with the score of a neuron |a * mean of df/da|, integrated over its layer, alpha a for a.

    The mean is over alpha from 0 to 1 (midpoint rule); one layer at a time is scaled as a whole, what follows is
    computed anew. Signed, the scores of a layer add up to f less f with the layer set to zero, up to the error of the
    quadrature. Pruned, measured and refused as prune_grad.
    """

    paper: ClassVar[str] = "Khakzar et al. 2021, arXiv 2103.16886 (NeuronIntGrad); 2019, arXiv 1911.11081 (PruneInt)"
    cost: ClassVar[str] = "steps x layers x (1 forward + 1 backward) + 2 forward + 1 backward"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "rules"})
    gives: ClassVar[frozenset[str]] = frozenset()
    axioms: ClassVar[frozenset[str]] = frozenset({"dummy", "batch_exact"})

    sparsity: float | None = None
    """Share of the neurons to prune, 0 to 1; 0.9 where max_output_change is not given."""
    max_output_change: float | None = None
    """Prune each sample as far as |p' - p| / p of the target's probability stays within this."""
    steps: int = 10
    """Points of the mean over alpha."""
    ops: str = "relu"
    """The nonlinearities whose outputs are neurons, a comma list such as relu,gelu,silu."""

    def __post_init__(self) -> None:
        """Raises UsageError for values out of range."""
        pruning.check("prune_int", self.ops, self.sparsity, self.max_output_change)
        if self.steps < 1:
            raise UsageError(f"prune_int: steps={self.steps} must be at least 1")

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Those of a network of one layer; each further one takes as many steps again."""
        return 2 + self.steps + (pruning.BISECTIONS if self.max_output_change is not None else 0), 1 + self.steps

    def ruled(self, model: Model, inputs: torch.Tensor) -> Ruled:
        """The graph with its neurons at hand. Raises ModelError where it has none of `ops`, but others."""
        return pruning.Network(model, inputs, self.ops, "prune_int").ruled

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Score, prune, and take the gradient of what is left."""
        net = pruning.Network(model, inputs, self.ops, "prune_int")
        score = partial(pruning.integrated_scores, steps=self.steps)
        sparsity = pruning.check("prune_int", self.ops, self.sparsity, self.max_output_change)
        return pruning.explain(net, inputs, target, score, sparsity, self.max_output_change)
