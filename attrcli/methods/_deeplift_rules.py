"""Which of DeepLIFT's rules (_contributions.py) an op takes: one table over the op table.

What is not here, and is no linear op, is refused. What an op decides by comparing (a mask, an order, a rounding) has no
multiplier: its contribution goes to the remainder.
"""

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from attrcli.graph import ops
from attrcli.graph.ops import OpClass
from attrcli.graph.rectified import relu
from attrcli.graph.rules import PLAIN, REFUSE, Rule, Step, Verdict, place_of
from attrcli.methods import _contributions as c
from attrcli.methods._contributions import Pair
from attrcli.methods._deeplift_distances import DISTANCES
from attrcli.methods._deeplift_grid import GRIDS
from attrcli.methods._deeplift_indices import seeing, selected
from attrcli.methods._deeplift_integral import divided, guarded, integrated
from attrcli.methods._deeplift_norms import NORMED, NORMS
from attrcli.methods._deeplift_polynomials import POLYNOMIALS
from attrcli.methods._deeplift_recurrent import RECURRENT
from attrcli.methods._deeplift_step import cut, pair
from attrcli.methods._deeplift_windows import WINDOWS

Tensor = torch.Tensor
aten = torch.ops.aten


@dataclass
class Choosing:
    """The rule of each node of one graph, in order; for activations, Rescale.

    With `integrates`, an op without a rule is integrated, and a division by what nearly vanishes.
    """

    integrates: bool = False
    _blind: set[fx.Node] = field(default_factory=set, init=False)

    def __call__(self, node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
        """The rule of a node."""
        moving = moving_of(node.args, varying)
        if moving_of(node.kwargs, varying):
            return REFUSE
        if (place := relu(node, varying)) is not None:  # the same however it is written, at its kink too
            return lambda step: c.relu(pair(step, place))
        blind = [item for item in moving if item in self._blind]
        verdict = _verdict(node, [bool(moving_of(arg, varying)) for arg in node.args])
        if verdict is PLAIN:
            if len(blind) == len(moving) or _is_blind(node):
                self._blind.add(node)
            elif blind:
                return seeing
        elif verdict is REFUSE and self.integrates and not blind and _is_float(node):
            return integrated
        elif self.integrates and node.target is aten.div.Tensor and verdict not in (PLAIN, _maybe_cut):
            return divided
        elif self.integrates and node.target in NORMED and not isinstance(verdict, Verdict):
            return partial(guarded, verdict)
        return verdict


def moving_of(args: Any, varying: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes among arguments, in lists too, that depend on the explained input."""
    found: list[fx.Node] = []
    fx.map_arg(args, lambda node: found.append(node) if node in varying else None)
    return found


def _is_blind(node: fx.Node) -> bool:
    """Whether an op that takes no rule gives whole numbers or truth values, where no gradient is seen."""
    target: Any = node.target
    if target is aten.to.dtype:
        return True
    if target is operator.getitem and node.args[1] != 0:
        source: Any = node.args[0]
        return ops.classify(source.target) is OpClass.POOLING
    return ops.classify(target) is OpClass.DISCRETE


def _is_float(node: fx.Node) -> bool:
    """Whether an op may have a derivative."""
    return ops.classify(node.target) not in (OpClass.DISCRETE, OpClass.CREATION, None)


def _verdict(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """The rule of an op, `depends` saying which of its arguments move."""
    target: Any = node.target
    if not node.meta.get("fractions", True):  # whole numbers: what reads them books what they decide
        return PLAIN
    if target in RULES:
        return RULES[target](node, depends)
    kind = ops.classify(target)
    if kind in (OpClass.SMOOTH, OpClass.KINKED):
        return _unary(target, kind) if not any(depends[1:]) else REFUSE
    if kind is OpClass.DISCRETE:
        return _cut if target in _ROUNDS else PLAIN
    if kind in (OpClass.LINEAR, OpClass.AFFINE, OpClass.SHAPE, OpClass.CREATION):
        return PLAIN if sum(depends) <= 1 or target in _SUMS else REFUSE
    if kind is OpClass.INDEXING:
        if not any(_is_index(node, i) for i, found in enumerate(depends) if found):
            return PLAIN
        return REFUSE if target is aten.embedding_bag.padding_idx else selected
    return REFUSE


_SUMS = frozenset((aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, operator.getitem))
_ROUNDS = frozenset(
    (
        aten.floor.default,
        aten.ceil.default,
        aten.round.default,
        aten.trunc.default,
        aten.sign.default,
        aten.floor_divide.default,
        aten.floor_divide.Scalar,
        aten.heaviside.default,
        aten.round.decimals,
    )
)


def _is_index(node: fx.Node, place: int) -> bool:
    """Whether an argument of an indexing op says where to read or write."""
    target: Any = node.target
    name = target._schema.arguments[place].name
    return name in ("index", "indices", "mask", "condition") or (
        target is aten.repeat_interleave.self_int and place > 0
    )


def _cut(step: Step) -> Any:
    return cut(step, step.node, step.run(), step.reference)


def _cast(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    if not node.args[1].is_floating_point:  # type: ignore[union-attr]
        return PLAIN

    def rule(step: Step) -> Any:
        return step.run() if step.args[0].requires_grad else _cut(step)

    return rule


def _detached(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    return _cut


# -- one operand -----------------------------------------------------------------------------------------------------


def _unary(target: Any, kind: OpClass) -> Rule:
    if target is aten.relu.default:
        return lambda step: c.relu(pair(step, 0))
    if target in c.CLOSED:
        return lambda step: c.rescale(pair(step, 0), c.CLOSED[target], step.run().detach())
    return _smooth(target, c.kinked if kind is OpClass.KINKED else c.smooth)


def _smooth(target: Any, form: Callable[..., Tensor] = c.smooth) -> Rule:
    """By the quotient of differences."""

    def rule(step: Step) -> Any:
        f = partial(_first_operand, step)
        return form(pair(step, 0), f, step.run().detach(), step.reference)

    return rule


def _first_operand(step: Step, x: Tensor) -> Any:
    return step.run(x, *step.args[1:])


def _power(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """z ** p, by a closed form where there is one."""
    forms: dict[float, Callable[[Tensor, Tensor], Tensor]] = {
        2: c.CLOSED[aten.square.default],
        0.5: c.CLOSED[aten.sqrt.default],
        -0.5: c.CLOSED[aten.rsqrt.default],
        -1: c.CLOSED[aten.reciprocal.default],
        3: lambda z, z0: z * z + z * z0 + z0 * z0,
    }
    form = forms.get(node.args[1]) if isinstance(node.args[1], int | float) else None
    if form is None:
        return _unary(node.target, OpClass.SMOOTH)
    return lambda step: c.rescale(pair(step, 0), form, step.run().detach())


def _logit(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """In closed form; with a bound that clamps, as any other function."""
    if len(node.args) > 1 and node.args[1] is not None:
        return _smooth(node.target)
    return _unary(node.target, OpClass.SMOOTH)


def _exponential(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    def rule(step: Step) -> Any:
        return c.smooth(pair(step, 1), lambda x: step.run(step.args[0], x), step.run().detach(), step.reference)

    return rule


# -- two operands ----------------------------------------------------------------------------------------------------


def _two(both: Callable[[Step], Any], *, divides: bool = False) -> Callable[[fx.Node, list[bool]], Rule | Verdict]:
    """A rule where both operands depend on the input, or the divisor does; autograd where one factor does."""

    def found(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
        return both if (depends[0] and depends[1]) or (divides and depends[1]) else _maybe_cut

    return found


def _always(both: Callable[[Step], Any]) -> Callable[[fx.Node, list[bool]], Rule | Verdict]:
    """A rule whichever of two operands depends on the input."""
    return lambda node, depends: both


def _bounded(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """A clamp, at a bound that is constant or moves."""
    return _elementwise if depends[1] else _unary(node.target, OpClass.KINKED)


def _kinked(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    return _unary(node.target, OpClass.KINKED)


def _divided_mode(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """A quotient, or one rounded: then what its change contributes is remainder."""
    return _cut if node.kwargs.get("rounding_mode") else _two(_quotient, divides=True)(node, depends)


def _maybe_cut(step: Step) -> Any:
    """A product with one operand that depends on the input: plain, but for what autograd cannot see."""
    args = list(step.args)
    for i in (0, 1):
        if step.depends(i) and not args[i].requires_grad:
            args[i] = pair(step, i).x
    return step.run(*args)


def _elementwise(step: Step) -> Any:
    return c.shapley(lambda a, b: step.run(a, b, *step.args[2:]), pair(step, 0), pair(step, 1), place_of(step.node))


def _product(step: Step) -> Any:
    return c.product(pair(step, 0), pair(step, 1))


def _quotient(step: Step) -> Any:
    return c.quotient(pair(step, 0), pair(step, 1), place_of(step.node))


def _matmul(step: Step) -> Any:
    a, b = pair(step, 0), pair(step, 1)
    if a.x.dim() < 2 or b.x.dim() < 2 or a.x.dim() != b.x.dim():
        return c.bilinear(torch.matmul, a, b)
    return c.matmul(a, b).x


def _with_bias(first: int, bias: int | None) -> Callable[[fx.Node, list[bool]], Rule | Verdict]:
    """linear, convolution, addmm, baddbmm: linear in one operand, or a product of two; the bias adds."""

    def found(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
        return rule if depends[first] and depends[first + 1] else PLAIN

    def rule(step: Step) -> Any:
        place = 0 if bias is None else bias
        without = [None if first == 0 and i == place else arg for i, arg in enumerate(step.args)]

        def op(a: Tensor, b: Tensor) -> Tensor:
            if step.node.target in (aten.addmm.default, aten.baddbmm.default):
                return torch.matmul(a, b)
            return step.run(a, b, *without[2:])  # type: ignore[no-any-return]

        made = c.bilinear(op, pair(step, first), pair(step, first + 1))
        held = step.args[place]
        if held is None:
            return made
        if first == 1:  # addmm and baddbmm scale both
            return step.kwargs.get("alpha", 1) * made + step.kwargs.get("beta", 1) * held
        channels = made.shape[1] if step.node.target is aten.convolution.default else None
        return made + (held if channels is None else held.reshape(channels, *[1] * (made.dim() - 2)))

    return found


def _addcmul(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    def rule(step: Step) -> Any:
        return step.args[0] + step.kwargs.get("value", 1) * c.product(pair(step, 1), pair(step, 2))

    return rule if depends[1] and depends[2] else PLAIN


def _addcdiv(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    def rule(step: Step) -> Any:
        divided = c.quotient(pair(step, 1), pair(step, 2), place_of(step.node))
        return step.args[0] + step.kwargs.get("value", 1) * divided

    return rule if depends[2] else PLAIN


def _lerp(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    def rule(step: Step) -> Any:
        start, end, weight = (pair(step, i) for i in range(3))
        return start.x + c.product(Pair(end.x - start.x, end.r - start.r), weight)

    return rule if depends[2] and (depends[0] or depends[1]) else PLAIN


def _where(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """c a + (1 - c) b; the condition's own part is remainder."""

    def rule(step: Step) -> Any:
        chosen, a, b = pair(step, 0), pair(step, 1), pair(step, 2)
        if bool((chosen.x.detach() == chosen.r).all()):
            return torch.where(step.args[0], a.x, b.x)
        return c.product(chosen, Pair(a.x - b.x, a.r - b.r)) + b.x

    return rule if depends[0] else PLAIN


def _masked_fill(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    def rule(step: Step) -> Any:
        chosen, x = pair(step, 1), pair(step, 0)
        if bool((chosen.x.detach() == chosen.r).all()):
            return step.run()
        return c.product(chosen, Pair(step.args[2] - x.x, step.args[2] - x.r)) + x.x

    return rule if depends[1] else PLAIN


RULES: dict[Any, Callable[[fx.Node, list[bool]], Rule | Verdict]] = (
    {
        aten.to.dtype: _cast,
        aten.detach.default: _detached,
        aten.pow.Tensor_Scalar: _power,
        aten.pow.Scalar: _exponential,
        aten.logit.default: _logit,
        aten.mul.Tensor: _two(_product),
        aten.div.Tensor: _two(_quotient, divides=True),
        aten.matmul.default: _two(_matmul),
        aten.mm.default: _two(_matmul),
        aten.bmm.default: _two(_matmul),
        aten.mv.default: _two(_matmul),
        aten.dot.default: _two(_matmul),
        aten.maximum.default: _always(_elementwise),
        aten.minimum.default: _always(_elementwise),
        aten.max.other: _always(_elementwise),
        aten.min.other: _always(_elementwise),
        aten.atan2.default: _always(_elementwise),
        aten.pow.Tensor_Tensor: _always(_elementwise),
        aten.fmax.default: _always(_elementwise),
        aten.fmin.default: _always(_elementwise),
        aten.clamp_min.Tensor: _bounded,
        aten.clamp_max.Tensor: _bounded,
        aten.remainder.Scalar: _kinked,
        aten.fmod.Scalar: _kinked,
        aten.div.Tensor_mode: _divided_mode,
        aten.remainder.Tensor: _always(_elementwise),
        aten.fmod.Tensor: _always(_elementwise),
        aten.copysign.Tensor: _always(_elementwise),
        aten.xlogy.Tensor: _always(_elementwise),
        aten.logaddexp.default: _always(_elementwise),
        aten.logaddexp2.default: _always(_elementwise),
        aten.hypot.default: _always(_elementwise),
        aten.linear.default: _with_bias(0, 2),
        aten.convolution.default: _with_bias(0, 2),
        aten.addmm.default: _with_bias(1, 0),
        aten.baddbmm.default: _with_bias(1, 0),
        aten.addcmul.default: _addcmul,
        aten.addcdiv.default: _addcdiv,
        aten.lerp.Tensor: _lerp,
        aten.lerp.Scalar: lambda node, depends: PLAIN,
        aten.where.self: _where,
        aten.masked_fill.Scalar: _masked_fill,
        aten.masked_fill.Tensor: _masked_fill,
    }
    | WINDOWS
    | NORMS
    | DISTANCES
    | POLYNOMIALS
    | GRIDS
    | RECURRENT
)
