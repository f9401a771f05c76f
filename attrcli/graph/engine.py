"""A graph made ready to run: logits only, batch norm folded, tensors placed and laid out; the process set up for it.

Every gain in speed that is not a method's own stands here, once, for all methods.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from attrcli.errors import ModelError, UsageError
from attrcli.graph import folding, passes
from attrcli.graph.check import attribute
from attrcli.graph.lowered import lower
from attrcli.graph.passes import Head

aten = torch.ops.aten

HEAVY = 100_000_000
"""Multiplications per sample from which folding and channels_last pay. Below, a graph runs as it was saved: both change
the rounding, which decides ties in max pools, and there the gain is some 10 % of very little."""

Norms = Literal["run", "kept", "folded"]
"""Batch norms as the engine runs them, folded in heavy graphs alone; each a node, as in the file; or folded wherever
they can be and in full precision, for rules that look at single weights."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def set_up(threads: int | None = None) -> None:
    """Set the number of threads, and keep freed memory in the process: a fresh mapping costs page faults per pass.

    Without glibc the allocator stays as it is.
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass


@dataclass(frozen=True)
class Engine:
    """`graph` as imported, cut to one output; `logits` before a final softmax or sigmoid; `run` is `logits`, ready."""

    graph: fx.GraphModule
    logits: fx.GraphModule
    run: fx.GraphModule
    head: Head
    output: str
    output_shape: tuple[int, ...]
    batch: int | None
    channels_last: bool
    activation_bytes: int

    @property
    def output_tensor(self) -> str | None:
        """The name that the file gives to the tensor of the logits, where the format has names."""
        node = next(iter(reversed(self.logits.graph.nodes))).args[0][0]
        name: str | None = node.meta.get("tensor")
        return name

    def __call__(self, *inputs: torch.Tensor, run: Callable[..., Any] | None = None) -> torch.Tensor:
        """Run on a batch, (N, ...) -> (N, K, ...); a frozen batch is cut into groups, the last one padded.

        `run` takes the place of the graph itself: its nodes under other rules, say.
        """
        run = run or self.run
        if self.channels_last:
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
        count = len(inputs[0])
        if self.batch is None:
            return run(*inputs)[0]  # type: ignore[no-any-return]
        results = []
        for start in range(0, count, self.batch):
            group = [x[start : start + self.batch] for x in inputs]
            short = self.batch - len(group[0])
            if short:
                group = [torch.cat([x, x[-1:].expand(short, *x.shape[1:])]) for x in group]
            result = run(*group)[0].reshape(self.batch, *self.output_shape)
            results.append(result[: self.batch - short])
        return torch.cat(results)


def make(
    graph: fx.GraphModule,
    output: str | None,
    device: torch.device,
    batch: int | None,
    *,
    stripped: bool = True,
    lowered: bool = False,
) -> Engine:
    """Make a graph ready, `stripped` of its final activation, `lowered` to bfloat16.

    Raises UsageError listing the outputs when there are several and none is chosen.
    """
    names = graph.meta["outputs"]
    if output is None and len(names) > 1:
        shapes = graph.meta["output_shapes"]
        listed = ", ".join(f"{name} {list(shapes[name][0][1:])}" for name in names)
        raise UsageError(f"the model has several outputs: choose one with --output NAME: {listed}")
    if output is not None and output not in names:
        raise UsageError(f"no output '{output}'; outputs: {', '.join(names)}")
    output = output or names[0]
    graph = passes.without_dropout(passes.only_output(graph, output))
    logits, head = passes.strip_head(graph) if stripped else (graph, "none")
    heavy = _multiply_adds(logits) >= HEAVY
    channels_last = heavy and _prefers_channels_last(logits)
    run = _placed(passes.fold_batch_norm(logits) if heavy else logits, device, channels_last, lowered)
    shape = graph.meta["output_shapes"][output][0]
    if batch is not None and shape[:1] != (batch,):
        if batch > 1:
            raise ModelError(
                f"output '{output}' of {list(shape)} does not keep the batch of {batch} in its first dimension"
            )
        shape = (batch, *shape)
    return Engine(graph, logits, run, head, output, tuple(shape[1:]), batch, channels_last, _activation_bytes(logits))


def prepared(
    ready: Engine, node: str | None, device: torch.device, *, norms: Norms, lowered: bool
) -> tuple[fx.GraphModule, str | None]:
    """The graph of the logits made ready with the value of one node in it, and with `norms` as asked.

    Also returns what the node is called there: a batch norm may have become the convolution before it.
    Raises UsageError for a name that is no node.
    """
    graph = ready.logits if node is None else passes.also(ready.logits, node)
    if norms == "folded":
        graph, lowered = folding.fold(passes.fold_constants(graph)), False
    elif norms == "run" and _multiply_adds(ready.logits) >= HEAVY:
        graph = passes.fold_batch_norm(graph)
    outputs: Any = next(iter(reversed(graph.graph.nodes))).args[0]
    name = None if node is None else outputs[1].name
    return _placed(graph, device, ready.channels_last, lowered), name


def _placed(graph: fx.GraphModule, device: torch.device, channels_last: bool, lowered: bool) -> fx.GraphModule:
    graph = passes.fold_constants(graph)
    return passes.place(lower(graph) if lowered else graph, device, channels_last=channels_last)


def _multiply_adds(graph: fx.GraphModule) -> int:
    """Multiplications in the convolutions of one sample."""
    total = 0
    for node in graph.graph.nodes:
        if node.target is aten.convolution.default and node.args[1].op == "get_attr" and "shapes" in node.meta:
            weight = attribute(graph, str(node.args[1].target))
            total += torch.Size(node.meta["shapes"][1]).numel() // graph.meta["batches"][1] * weight[0].numel()
    return total


def _prefers_channels_last(graph: fx.GraphModule) -> bool:
    """Whether most of the work is in 2-d convolutions over many channels, where oneDNN and cuDNN are faster so."""
    for node in graph.graph.nodes:
        if node.target is aten.convolution.default:
            weight = attribute(graph, str(node.args[1].target)) if node.args[1].op == "get_attr" else None
            if weight is not None and weight.dim() == 4 and weight.shape[1] >= 16:
                return True
    return False


def _activation_bytes(graph: fx.GraphModule) -> int:
    """Bytes of all intermediate tensors of one sample, as an upper bound on what a backward pass keeps."""
    total = 0
    for node in graph.graph.nodes:
        if node.op == "call_function" and (shapes := node.meta.get("shapes")):
            total += torch.Size(shapes[1]).numel() // max(1, graph.meta["batches"][1])
    return total * int(graph.meta["itemsize"])


def free_memory() -> int:
    """Bytes of memory that this machine can still give, the limit of a container included."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            maximum = limit.read().strip()
            if maximum != "max":
                free = min(free, int(maximum) - int(current.read()))
    except (OSError, KeyError, ValueError):
        pass
    return free
