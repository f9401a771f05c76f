"""Which of LRP's rules an op takes: one table over the op table, and the composites that say how layers differ."""

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attrcli.errors import UnsupportedOp
from attrcli.graph import ops
from attrcli.graph.ops import OpClass
from attrcli.graph.rules import PLAIN, REFUSE, Rule, Step, Verdict, own, place_of
from attrcli.methods import _lrp_attention as attention
from attrcli.methods._contributions import unbroadcast
from attrcli.methods._lrp_gates import gate_rank
from attrcli.methods._lrp_linear import Name, is_layer, rule_of
from attrcli.methods._lrp_step import cut, moving, passed, proportional, routed, to

Tensor = torch.Tensor
aten = torch.ops.aten


@dataclass(frozen=True)
class Composite:
    """The rules of convolutions, of other layers, and of those that no layer comes before (None: as the others).

    `anywhere`: the rule of first layers is for those of either kind, not for convolutions alone.
    """

    conv: Name
    dense: Name
    first: Name | None = None
    anywhere: bool = True


COMPOSITES: dict[str, Composite] = {
    "epsilon": Composite("epsilon", "epsilon"),
    "epsilon_plus": Composite("zplus", "epsilon"),
    "epsilon_plus_flat": Composite("zplus", "epsilon", "flat"),
    "epsilon_plus_wsquare": Composite("zplus", "epsilon", "wsquare"),
    "epsilon_gamma": Composite("gamma", "epsilon"),
    "epsilon_gamma_box": Composite("gamma", "epsilon", "zbox", anywhere=False),
    "epsilon_alpha2_beta1": Composite("alpha2beta1", "epsilon"),
    "epsilon_alpha2_beta1_flat": Composite("alpha2beta1", "epsilon", "flat"),
    "deep_taylor": Composite("zplus", "zplus", "zbox"),
}

_COPIES = frozenset(
    (
        operator.getitem, aten.select.int, aten.slice.Tensor, aten.narrow.default, aten.index.Tensor,
        aten.index_select.default, aten.gather.default, aten.take_along_dim.default, aten.split.Tensor,
        aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.tensor_split.sections,
        aten.tensor_split.indices, aten.flip.default, aten.roll.default, aten.repeat.default,
        aten.repeat_interleave.self_int, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
        aten.diagonal.default, aten.channel_shuffle.default, aten.rot90.default, aten.take.default,
        aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default,
        aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default,
    )
)  # fmt: skip
"""Every element of the result is one of the argument: autograd hands relevance back whole."""

_ROUTES = frozenset(
    (
        aten.cat.default, aten.stack.default, aten.where.self, aten.select_scatter.default, aten.slice_scatter.default,
        aten.scatter.src, aten.scatter.value, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.tril.default,
        aten.triu.default, aten.diag_embed.default, aten.index_copy.default, aten.index_fill.int_Scalar,
        aten.index_fill.int_Tensor, aten.masked_scatter.default, aten.diagonal_scatter.default,
        aten.max_unpool2d.default, aten.max_unpool3d.default, aten.constant_pad_nd.default,
        aten.im2col.default,
    )
)  # fmt: skip
"""The same with constants between."""

_SUMS = frozenset((aten.scatter_add.default, aten.index_add.default))

_WINNERS = frozenset(
    (
        aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
        aten.max_pool1d_with_indices.default, aten.max_pool2d_with_indices.default,
        aten.max_pool3d_with_indices.default, aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default,
        aten.adaptive_max_pool3d.default, aten.amax.default, aten.amin.default, aten.max.default, aten.min.default,
        aten.max.dim, aten.min.dim, aten.topk.default, aten.sort.default, aten.sort.stable, aten.median.default,
        aten.median.dim, aten.nanmedian.default, aten.nanmedian.dim, aten.kthvalue.default, aten.mode.default,
        aten.cummax.default, aten.cummin.default, aten.aminmax.default,
    )
)  # fmt: skip
"""Every element of the result is the largest, say, of some: autograd hands relevance to it, shared among equals."""


@dataclass
class Rules:
    """`(node, varying) -> rule`, for one graph.

    `box` gives the bounds of a layer's own input, for the z-box rule.
    """

    composite: Composite
    epsilon: float
    gamma: float
    attention: str
    box: Callable[[fx.Node], Callable[[Step], tuple[Tensor, Tensor]]]
    behind: set[fx.Node] = field(default_factory=set)
    """Nodes that are layers, or have one in front of them."""

    def __call__(self, node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
        """The rule of a node, which is asked in the order of the graph."""
        first = self.behind.isdisjoint(node.all_input_nodes)
        if is_layer(node, varying):
            self.behind.add(node)
            return _held(self._layer(node, first))
        if not first:
            self.behind.add(node)
        verdict = self._other(node, varying)
        return verdict if isinstance(verdict, Verdict) else _held(verdict)

    def _layer(self, node: fx.Node, first: bool) -> Rule:
        conv, composite = node.target is aten.convolution.default, self.composite
        name = composite.conv if conv else composite.dense
        if first and composite.first is not None and (conv or composite.anywhere):
            name = composite.first
        bounds = self.box(node) if name == "zbox" else None
        return rule_of(name, self.epsilon, self.gamma, bounds)

    def _other(self, node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
        target: Any = node.target
        opened = attention.table(self.attention, self.epsilon)
        if target in opened or attention.is_product(node, varying):
            if self.attention == "refuse":
                raise UnsupportedOp(
                    f"{place_of(node)}: lrp goes through attention and normalisation only with -o attention=attnlrp "
                    "or -o attention=cp; methods that need no rules: integrated_gradients, gradient, occlusion"
                )
            masked = any(isinstance(arg, fx.Node) and arg in varying for arg in node.args[3:])
            return REFUSE if masked else opened.get(target, attention.product(self.epsilon))
        if target in _TWO:
            return _TWO[target](node, varying)
        if target in _SUMS or (target is aten.index_put.default and True in node.args[3:]) or _transposes(node):
            return proportional(self.epsilon)
        if target in _COPIES:
            return PLAIN
        if target in _ROUTES or target is aten.index_put.default:
            return routed
        return self._by_class(node, varying)

    def _by_class(self, node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
        target, kind = node.target, ops.classify(node.target)
        if kind in (OpClass.SMOOTH, OpClass.KINKED):
            return passed if sum(arg in varying for arg in node.all_input_nodes) == 1 else REFUSE
        if kind is OpClass.DISCRETE:
            return cut
        if kind in (OpClass.LINEAR, OpClass.AFFINE):
            layer = target in (aten.linear.default, aten.convolution.default, aten.addmm.default)
            return REFUSE if layer or _weighs(node, varying) else proportional(self.epsilon)
        if kind is OpClass.POOLING and target in _WINNERS:
            return PLAIN
        return PLAIN if kind in (OpClass.SHAPE, OpClass.CREATION) else REFUSE


def _transposes(node: fx.Node) -> bool:
    """Whether an einsum has one operand, which it orders anew or sums."""
    return node.target is aten.einsum.default and len(node.args[1]) == 1  # type: ignore[arg-type]


def _weighs(node: fx.Node, varying: Collection[fx.Node]) -> bool:
    """Whether an op of the class affine multiplies two that depend on the input."""
    return node.target is aten.lerp.Tensor and node.args[2] in varying


def _held(rule: Rule) -> Rule:
    """A rule for what moves; what depends on the input by comparisons alone stays a constant."""
    return lambda step: rule(step) if moving(step) else step.run()


# -- two operands ----------------------------------------------------------------------------------------------------


def _factor(step: Step) -> Any:
    """All to the one factor that moves; of a quotient, to the numerator where that does."""
    return to(step, moving(step)[0])


def _times(node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
    """All to what a gate is multiplied with; half and half where neither factor is a gate, or both are."""
    gates = [gate_rank(arg, varying) for arg in node.args[:2]]

    def rule(step: Step) -> Any:
        if len(moving(step)) == 1:
            return _factor(step)
        if gates[0] != gates[1]:
            return to(step, step.args[1 if gates[0] > gates[1] else 0])
        shapes = [step.args[i].shape for i in (0, 1)]

        def halves(relevance: Tensor) -> list[Tensor]:
            return [unbroadcast(relevance / 2, shape) for shape in shapes]

        return own(step.run().detach(), step.args[:2], halves)

    return rule


def _extreme(sign: int) -> Callable[[fx.Node, Collection[fx.Node]], Rule | Verdict]:
    """The larger (or smaller) of two, the first of equals; an activation where the other is a constant."""

    def found(node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
        def rule(step: Step) -> Any:
            if len(moving(step)) == 1:
                return passed(step)
            a, b = step.args[:2]
            won = sign * (a - b).detach() >= 0

            def spread(relevance: Tensor) -> list[Tensor]:
                first = torch.where(won, relevance, 0)
                return [unbroadcast(first, a.shape), unbroadcast(relevance - first, b.shape)]

            return own(step.run().detach(), [a, b], spread)

        return rule

    return found


def _converted(node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
    return PLAIN if node.args[1].is_floating_point else cut  # type: ignore[union-attr]


_TWO: dict[Any, Callable[[fx.Node, Collection[fx.Node]], Rule | Verdict]] = {
    aten.mul.Tensor: _times,
    aten.mul.Scalar: lambda node, varying: _factor,
    aten.div.Tensor: lambda node, varying: _factor,
    aten.div.Scalar: lambda node, varying: _factor,
    aten.maximum.default: _extreme(1),
    aten.fmax.default: _extreme(1),
    aten.minimum.default: _extreme(-1),
    aten.fmin.default: _extreme(-1),
    aten.neg.default: lambda node, varying: passed,
    aten.to.dtype: _converted,
    aten.detach.default: lambda node, varying: PLAIN,
}
