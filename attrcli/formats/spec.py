"""What a model file says of its inputs and outputs, and what a loaded file offers, whatever its format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx


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
