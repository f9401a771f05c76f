"""PruneGrad (NeuronMCT)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attrcli.graph.rules import Ruled
from attrcli.methods import _pruning as pruning
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target


@dataclass(frozen=True)
class PruneGrad:
    """The gradient of the score in the network that is left when the neurons that matter least for this input are cut.

    Score of a neuron: |a df/da|, to first order the change of f without it; of all layers together, the lowest are set
    to zero, for each sample by itself. A neuron is one element of the output of one call of a ReLU. Not times the
    input. A note per sample tells the share that was pruned (neurons that tie with the threshold go, too: zeros, above
    all) and by how much the prediction changed. A graph without any nonlinearity has no neurons: the map is then the
    gradient, with a warning; one with others than `ops` is refused.
    """

    paper: ClassVar[str] = "Khakzar et al. 2021, arXiv 2103.16886 (NeuronMCT); 2019, arXiv 1911.11081 (PruneGrad)"
    cost: ClassVar[str] = "2 forward + 2 backward; with max_output_change 12 forward"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "rules"})
    gives: ClassVar[frozenset[str]] = frozenset()
    axioms: ClassVar[frozenset[str]] = frozenset({"dummy", "batch_exact"})

    sparsity: float | None = None
    """Share of the neurons to prune, 0 to 1; 0.9 where max_output_change is not given."""
    max_output_change: float | None = None
    """Prune each sample as far as |p' - p| / p of the target's probability stays within this."""
    ops: str = "relu"
    """The nonlinearities whose outputs are neurons, a comma list such as relu,gelu,silu."""

    def __post_init__(self) -> None:
        """Raises UsageError for values out of range."""
        pruning.check("prune_grad", self.ops, self.sparsity, self.max_output_change)

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Two of each; one forward for each halving of an allowed change."""
        return 2 + (pruning.BISECTIONS if self.max_output_change is not None else 0), 2

    def ruled(self, model: Model, inputs: torch.Tensor) -> Ruled:
        """The graph with its neurons at hand. Raises ModelError where it has none of `ops`, but others."""
        return pruning.Network(model, inputs, self.ops, "prune_grad").ruled

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Score, prune, and take the gradient of what is left."""
        net = pruning.Network(model, inputs, self.ops, "prune_grad")
        sparsity = pruning.check("prune_grad", self.ops, self.sparsity, self.max_output_change)
        return pruning.explain(net, inputs, target, pruning.gradient_scores, sparsity, self.max_output_change)
