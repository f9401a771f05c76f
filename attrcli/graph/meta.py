"""Shapes on the meta device, of ops for which torch's own way there is slow, or does not look at all operands."""

from typing import Any

import torch

aten = torch.ops.aten


def _recurrent(op: Any) -> Any:
    """What an op over a sequence gives, from one step over zeros: torch takes some 5 ms a step, and seconds before.

    The output lies in memory as (L, N, D), batch first too.
    """

    def run(x: torch.Tensor, state: Any, weights: Any, *args: Any) -> Any:
        along = 1 if args[-1] else 0
        zeros = (_zeros(x.narrow(along, 0, 1)), _zeros(state), _zeros(weights))
        y, *states = (item.to("meta") for item in op(*zeros, *args))
        made = y.new_empty(x.shape[along], *y.transpose(0, along).shape[1:]).transpose(0, along)
        return (made, *states)

    return run


def _zeros(tensors: Any) -> Any:
    if isinstance(tensors, list):
        return [_zeros(item) for item in tensors]
    return torch.zeros(tensors.shape, dtype=tensors.dtype)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """With a look at the bias, which runs only where it fits."""
    outputs = weight.shape[0]
    _check_bias(weight, bias, (1, outputs))
    return aten.linear.default(x, weight, bias)


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any) -> Any:
    """The same; transposed is the fifth argument from here, the last the groups."""
    _check_bias(weight, bias, (weight.shape[1] * args[-1] if args[3] else weight.shape[0],))
    return aten.convolution.default(x, weight, bias, *args)


def _batch_norm(x: torch.Tensor, *stored: Any) -> torch.Tensor:
    """As large as what it normalises, which torch finds out by a decomposition: that imports its compiler, a second."""
    for tensor in stored[:4]:
        if tensor is not None and tensor.shape != x.shape[1:2]:
            raise RuntimeError(f"a batch norm of {x.shape[1:2].numel()} channels with a tensor of {list(tensor.shape)}")
    return torch.empty_like(x)


def _check_bias(weight: torch.Tensor, bias: torch.Tensor | None, lengths: tuple[int, ...]) -> None:
    if 0 in weight.shape:
        raise RuntimeError(f"a weight of {list(weight.shape)}")
    if bias is not None and bias.dim() and bias.shape[-1] not in lengths:
        raise RuntimeError(f"a bias of {list(bias.shape)} for {lengths[-1]} outputs")


SHAPED = {
    aten.lstm.input: _recurrent(aten.lstm.input),
    aten.gru.input: _recurrent(aten.gru.input),
    aten.rnn_tanh.input: _recurrent(aten.rnn_tanh.input),
    aten.rnn_relu.input: _recurrent(aten.rnn_relu.input),
    aten.linear.default: _linear,
    aten.convolution.default: _convolution,
    aten.batch_norm.default: _batch_norm,
}
"""What runs in place of an op on the meta device."""
