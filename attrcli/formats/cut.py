"""A model that begins at one of its own nodes: what `--at NODE` explains."""

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from attrcli.formats.spec import Sample, Source, TensorSpec
from attrcli.graph import passes


class Cut:
    """Another source, whose first input is the value of a node; its own inputs stay beside it, held at their values."""

    def __init__(self, source: Source, node: str, samples: Mapping[str, Sample], dtype: torch.dtype) -> None:
        self.source, self.node, self.samples = source, node, samples
        self.format = source.format
        self.inputs = (TensorSpec(node, None, dtype), *source.inputs)
        self.outputs = source.outputs
        self.metadata = source.metadata

    def build(self, samples: Mapping[str, Sample], dtype: torch.dtype, batches: Sequence[int]) -> fx.GraphModule:
        """Build the other source's graph and cut it. Raises UsageError for a name that is no node."""
        return passes.cut(self.source.build(self.samples, dtype, batches), self.node)

    def operations(self) -> dict[str, int]:
        """The other source's."""
        return self.source.operations()

    def parameter_count(self) -> int:
        """The other source's."""
        return self.source.parameter_count()
