"""What a model file says of its inputs and outputs, and what a loaded file offers, whatever its format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from attrcli.errors import ModelError

ADVICE = "exporting the model to ONNX may help"
"""What to try with a file of torch that holds an op that the graph cannot."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: its shape with the batch first, None where free; `shape` None when the file does not say."""

    name: str
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Sample:
    """Shape and dtype of one sample of an input, without the batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Source(Protocol):
    """A checked and opened model file.

    `inputs` in the order of the file; `outputs` None when only a built graph knows them; `metadata` the text that the
    file carries for a sidecar. `build` returns a canonical graph for these sample shapes with the two given batch
    sizes as probes (equal when the batch is frozen) and raises UnsupportedOp or ModelError.
    """

    format: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] | None
    metadata: Mapping[str, str]

    def build(self, samples: Mapping[str, Sample], dtype: torch.dtype, batches: Sequence[int]) -> fx.GraphModule:
        """Build the graph."""
        ...

    def operations(self) -> dict[str, int]:
        """Count operations by name, without building the graph."""
        ...

    def parameter_count(self) -> int:
        """Number of elements of all parameters."""
        ...


def describe(specs: tuple[TensorSpec, ...]) -> str:
    """Names, shapes and types of inputs or outputs, for a message."""

    def one(spec: TensorSpec) -> str:
        shape = "?" if spec.shape is None else "x".join("N" if size is None else str(size) for size in spec.shape)
        return f"{spec.name} {shape} {str(spec.dtype).removeprefix('torch.')}"

    return ", ".join(one(spec) for spec in specs)


def named(name: str, result: Any) -> dict[str, Any]:
    """What stands in containers, under the keys of the outermost dictionary and then the positions within."""
    if isinstance(result, dict):
        items = [(str(key) if name == "output" else f"{name}_{key}", item) for key, item in result.items()]
    elif isinstance(result, (list, tuple)):
        items = [(f"{name}_{index}", item) for index, item in enumerate(result)]
    else:
        return {name: result}
    return {inner: value for key, item in items for inner, value in named(key, item).items()}


def require_shape(declared: tuple[int | None, ...] | None, shape: tuple[int, ...]) -> None:
    """Raise ModelError when a sample's shape cannot be what the file asks for."""
    if declared is None:
        return
    fits = len(declared) == len(shape) + 1 and all(d in (None, s) for d, s in zip(declared[1:], shape, strict=True))
    if not fits:
        wanted = "x".join("?" if size is None else str(size) for size in declared[1:])
        raise ModelError(f"the model's input is {wanted} per sample; this input is {'x'.join(map(str, shape))}")


_CLOSING = {"(": ")", "[": "]", "{": "}"}


def source_line(code: str) -> str:
    """A line of source for a message: cut, with what it leaves open closed, 'softmax(...)' for 'softmax('."""
    code, open_ones = code.strip()[:120], list[str]()
    for letter in code:
        if letter in _CLOSING:
            open_ones.append(_CLOSING[letter])
        elif open_ones and letter == open_ones[-1]:
            open_ones.pop()
    return f"{code}...{''.join(open_ones[::-1])}" if open_ones else code
