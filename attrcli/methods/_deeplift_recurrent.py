"""DeepLIFT's rules for LSTM, GRU and plain recurrent layers: unrolled, with gates as products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attrcli.graph.rules import REFUSE, Rule, Step, Verdict
from attrcli.methods import _contributions as c
from attrcli.methods._contributions import Pair
from attrcli.methods._deeplift_step import pair

Tensor = torch.Tensor
aten = torch.ops.aten
State = list[Pair]
Cell = Callable[[Pair, State, list[Any]], State]
"""One step of one layer: what comes in, the state (output first), and the weights, to the next state."""


def _sigmoid(x: Pair) -> Pair:
    return Pair(c.rescale(x, c.CLOSED[aten.sigmoid.default], x.x.detach().sigmoid()), x.r.sigmoid())


def _tanh(x: Pair) -> Pair:
    return Pair(c.rescale(x, c.CLOSED[aten.tanh.default], x.x.detach().tanh()), x.r.tanh())


def _relu(x: Pair) -> Pair:
    return Pair(c.relu(x), x.r.relu())


def _times(a: Pair, b: Pair) -> Pair:
    return Pair(c.product(a, b), a.r * b.r)


def _plus(a: Pair, b: Pair) -> Pair:
    return Pair(a.x + b.x, a.r + b.r)


def _minus(a: Pair, b: Pair) -> Pair:
    return Pair(a.x - b.x, a.r - b.r)


def _parts(x: Pair, count: int) -> list[Pair]:
    return [Pair(a, b) for a, b in zip(x.x.chunk(count, -1), x.r.chunk(count, -1), strict=True)]


def _affine(x: Pair, weight: Tensor, bias: Tensor | None) -> Pair:
    return x.linear(lambda z: torch.nn.functional.linear(z, weight, bias))


def _lstm_cell(x: Pair, state: State, weights: list[Any]) -> State:
    """i, f, o = sigmoid; c' = f c + i tanh(g); h' = o tanh(c'), projected where the layer is."""
    (h, cell), (w_x, w_h, b_x, b_h, *projection) = state, weights
    i, f, g, o = _parts(_plus(_affine(x, w_x, b_x), _affine(h, w_h, b_h)), 4)
    cell = _plus(_times(_sigmoid(f), cell), _times(_sigmoid(i), _tanh(g)))
    out = _times(_sigmoid(o), _tanh(cell))
    return [_affine(out, projection[0], None) if projection else out, cell]


def _gru_cell(x: Pair, state: State, weights: list[Any]) -> State:
    """r, z = sigmoid; n = tanh(W x + r (W h)); h' = n + z (h - n)."""
    (h,), (w_x, w_h, b_x, b_h) = state, weights
    (r_x, z_x, n_x), (r_h, z_h, n_h) = _parts(_affine(x, w_x, b_x), 3), _parts(_affine(h, w_h, b_h), 3)
    reset, update = _sigmoid(_plus(r_x, r_h)), _sigmoid(_plus(z_x, z_h))
    new = _tanh(_plus(n_x, _times(reset, n_h)))
    return [_plus(new, _times(update, _minus(h, new)))]


def _plain(activation: Callable[[Pair], Pair]) -> Cell:
    def cell(x: Pair, state: State, weights: list[Any]) -> State:
        w_x, w_h, b_x, b_h = weights
        return [activation(_plus(_affine(x, w_x, b_x), _affine(state[0], w_h, b_h)))]

    return cell


def _unrolled(cell: Cell, states: int) -> Callable[[fx.Node, list[bool]], Rule | Verdict]:
    def rule(step: Step) -> Any:
        _, hidden, weights, biased, layers, _, _, both_ways, batch_first = step.args
        x, there = pair(step, 0), step.reference_args[1]
        given = [hidden] if isinstance(hidden, Tensor) else hidden
        given0 = [there] if isinstance(there, Tensor) else there
        time = 1 if batch_first else 0
        x = x if time == 0 else x.linear(lambda z: z.transpose(0, 1))
        ways = 2 if both_ways else 1
        each = len(weights) // (layers * ways)
        last: list[State] = []
        for layer in range(layers):
            outs = []
            for way in range(ways):
                place = layer * ways + way
                held = list(weights[place * each : (place + 1) * each])
                held = held if biased else [*held[:2], None, None, *held[2:]]
                state = [Pair(now[place], then[place]) for now, then in zip(given, given0, strict=True)]
                out, state = _run(cell, x, state, held, backwards=way == 1)
                outs.append(out)
                last.append(state)
            x = Pair(*(torch.cat([getattr(out, side) for out in outs], -1) for side in ("x", "r")))
        made = x.x.transpose(0, 1) if time else x.x
        return made, *(torch.stack([state[i].x for state in last]) for i in range(states))

    return lambda node, depends: REFUSE if any(depends[2:]) else rule


def _run(cell: Cell, x: Pair, state: State, weights: list[Any], *, backwards: bool) -> tuple[Pair, State]:
    """One layer in one direction over (T, N, F)."""
    outs: list[Pair] = []
    for t in reversed(range(len(x.x))) if backwards else range(len(x.x)):
        state = cell(Pair(x.x[t], x.r[t]), state, weights)
        outs.append(state[0])
    outs = outs[::-1] if backwards else outs
    return Pair(torch.stack([o.x for o in outs]), torch.stack([o.r for o in outs])), state


def _single(cell: Cell, states: int) -> Callable[[fx.Node, list[bool]], Rule | Verdict]:
    """One step of a cell that is called by itself."""

    def rule(step: Step) -> Any:
        _, hidden, *weights = step.args
        there = step.reference_args[1]
        given = zip(*((each if isinstance(each, (list, tuple)) else [each]) for each in (hidden, there)), strict=True)
        made = cell(pair(step, 0), [Pair(now, then) for now, then in given], [*weights, *[None] * (4 - len(weights))])
        return tuple(state.x for state in made) if states > 1 else made[0].x

    return lambda node, depends: REFUSE if any(depends[2:]) else rule


RECURRENT: dict[Any, Callable[[fx.Node, list[bool]], Rule | Verdict]] = {
    aten.lstm.input: _unrolled(_lstm_cell, 2),
    aten.gru.input: _unrolled(_gru_cell, 1),
    aten.rnn_tanh.input: _unrolled(_plain(_tanh), 1),
    aten.rnn_relu.input: _unrolled(_plain(_relu), 1),
    aten.lstm_cell.default: _single(_lstm_cell, 2),
    aten.gru_cell.default: _single(_gru_cell, 1),
    aten.rnn_tanh_cell.default: _single(_plain(_tanh), 1),
    aten.rnn_relu_cell.default: _single(_plain(_relu), 1),
}
