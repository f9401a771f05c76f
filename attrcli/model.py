"""A loaded model: its graph in torch and, for an ONNX file, a session in ONNX Runtime; predictions, scores, gradients.

model = attrcli.model.load("net.onnx")
logits = model(batch)                                    # (N, K), as the file outputs it
gradient, score = model.gradient(batch, Target(index))   # (N, ...), (N,)
"""

# long: the one face of a model to the methods; what they call stands together

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attrcli import batching, formats
from attrcli.errors import InputError, ModelError, NonFiniteError, UnsupportedOp, UsageError
from attrcli.formats.cut import Cut
from attrcli.formats.spec import Sample, Source, describe
from attrcli.graph import engine, passes
from attrcli.graph.engine import Engine, Norms
from attrcli.graph.rules import Choice, Ruled, dependent, merges_batch
from attrcli.graph.trace import first_nonfinite
from attrcli.runtime import Runtime
from attrcli.score import Head, Target, apply_head, select

__all__ = ["Model", "Target", "describe", "load"]

PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}
"""Type of inputs, outputs and sums; bf16 computes convolutions and matrix products in bfloat16."""


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "float32",
    threads: int | None = None,
    trusted: bool = False,
) -> "Model":
    """Open and check a model file; its graph is built at the first batch. `trusted` is explained at `formats.load`.

    Raises ModelError for what cannot be loaded, UsageError for an unknown device or precision.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: choose from {', '.join(PRECISIONS)}")
    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"--threads {threads}: choose from 1 to 1024")
    engine.set_up(threads)
    path = Path(path)
    return Model(
        path, formats.load(path, trusted=trusted), _device(device), PRECISIONS[precision], lowered=precision == "bf16"
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: choose from auto, cpu, cuda")
    return torch.device(name)


class Model:
    """A model file opened for explanation; `bind` says which input and output are meant when there are several."""

    def __init__(
        self, path: Path, source: Source, device: torch.device, dtype: torch.dtype, *, lowered: bool = False
    ) -> None:
        self.path, self.source, self.device, self.dtype, self.lowered = path, source, device, dtype, lowered
        self.format = source.format
        self.rows = 32
        self.on_pass: Callable[[int], None] = lambda rows: None
        self.input: str = source.inputs[0].name if source.inputs else ""
        self.input_dtype: torch.dtype | None = None
        self.output: str | None = None
        self.declared: Head | None = None
        self.channels_last_input = self.flat_input = False
        self.fixed: dict[str, torch.Tensor] = {}
        self.bounds: tuple[torch.Tensor, torch.Tensor] | None = None
        """The lowest and the highest value that the explained input can have, of a shape that broadcasts to a sample's;
        None where that is not known."""
        self._engines: dict[Any, Engine] = {}
        self._prepared: dict[Any, tuple[fx.GraphModule, str | None]] = {}
        self._alone: bool | None = None
        self._runtime = Runtime(self)

    def bind(
        self,
        *,
        input: str | None = None,
        output: str | None = None,
        fixed: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        declared: Head | None = None,
        layout: str = "NCHW",
        flat: bool = False,
    ) -> None:
        """Choose the explained input and the scored output; hold every other input at a value for all samples.

        `fixed` values are shaped like one sample. `dtype` is the explained input's, for files that do not say.
        `declared` is what the sidecar says the output went through, for files whose graph does not tell. `layout`
        NHWC means that the file takes (N, H, W, C), or (N, L, C), and `flat` that it takes a sample as one vector; here
        the input is (N, C, ...) all the same.
        Raises UsageError listing names, shapes and types.
        """
        names = [spec.name for spec in self.source.inputs]
        if input is not None and input not in names:
            raise UsageError(f"{self.path}: no input '{input}'; its inputs: {describe(self.source.inputs)}")
        if input is None and len(names) > 1:
            raise UsageError(f"{self.path} has several inputs; choose one with --input: {describe(self.source.inputs)}")
        self.input, self.output, self.input_dtype, self.declared = input or names[0], output, dtype, declared
        self.channels_last_input, self.flat_input = layout == "NHWC", flat
        self.fixed = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in (fixed or {}).items()
        }
        missing = [name for name in names if name != self.input and name not in self.fixed]
        unknown = [name for name in self.fixed if name not in names or name == self.input]
        if missing or unknown:
            what = (
                f"give --fix {missing[0]}=FILE|zero" if missing else f"--fix {unknown[0]}: no other input of that name"
            )
            raise UsageError(f"{self.path}: {what}; its inputs: {describe(self.source.inputs)}")
        self._engines.clear()
        self._prepared.clear()
        self._runtime = Runtime(self)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # -- what methods use ----------------------------------------------------------------------------------------

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run the model as the file has it, a final softmax included: (N, ...) -> (N, K, ...)."""
        return apply_head(self.logits(inputs), self.head(inputs))

    def logits(
        self, inputs: torch.Tensor, held: Mapping[str, torch.Tensor] | None = None, *, ruled: Ruled | None = None
    ) -> torch.Tensor:
        """Run forward only, in passes: (N, ...) -> (N, K, ...) before a final softmax or sigmoid.

        An ONNX file runs in ONNX Runtime; everything else, float64, and what is to pass by rules, in torch.
        """
        held = held or {}
        parts = []
        for rows in self.passes(len(inputs)):
            chunk, others = inputs[rows], {name: value[rows] for name, value in held.items()}
            with torch.no_grad():
                there = ruled is None and self._runtime.gives(chunk, held)
                parts.append(self._runtime.logits(chunk) if there else self._graph_run(chunk, others, ruled))
            self.on_pass(len(rows))
        return torch.cat(parts)

    def scores(self, inputs: torch.Tensor, target: Target) -> torch.Tensor:
        """Forward-only scores, float64 (N,), of a batch of any length. Raises NonFiniteError naming the node."""
        values = select(self.logits(inputs, target.held), target, self.head(inputs))
        self._require_finite(values, inputs, target)
        return values.double()

    def gradient(
        self,
        inputs: torch.Tensor,
        target: Target,
        *,
        ruled: Callable[..., Any] | None = None,
        references: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward and one backward pass: each row's gradient of its score, and the scores (N,).

        With `ruled` (a `Ruled`, or what wraps one), what the rules propagate in place of the gradient; `references` are
        the baselines that they compare with, a row for each input or one for all.
        For at most `rows` rows: cut larger work with `passes`. Raises NonFiniteError naming the node.
        """
        if not inputs.is_floating_point():
            raise ModelError(
                f"{self.path}: input '{self.input}' holds whole numbers ({inputs.dtype}) and has no gradient; explain "
                "a node of the graph behind it, with --at NODE"
            )
        leaf = inputs.detach().requires_grad_(True)
        with torch.enable_grad():
            score = select(self._graph_run(leaf, target.held, ruled, references), target, self.head(inputs))
            if score.requires_grad:
                try:
                    (gradient,) = torch.autograd.grad(score.sum(), leaf)
                except UnsupportedOp as error:  # a rule that finds out on the way back
                    raise UnsupportedOp(f"{self.path}: {error}") from error
            else:
                gradient = torch.zeros_like(inputs)
        self.on_pass(len(inputs))
        score = score.detach()
        if not bool(torch.isfinite(gradient.sum() + score.sum())):
            self._require_finite(gradient.flatten(1), inputs, target)
            self._require_finite(score, inputs, target)
        return gradient, score

    def gradient_at(
        self, inputs: torch.Tensor, target: Target, ruled: Ruled
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One forward pass, and one backward to the node at which `ruled` begins.

        Returns the node's value and its gradient, (N, ...), and the scores (N,).
        For at most `rows` rows, and a node with the batch in front. Raises NonFiniteError naming the node.
        """
        ruled.leaves.clear()
        with torch.enable_grad():
            score = select(self._graph_run(inputs.detach(), target.held, ruled), target, self.head(inputs))
            given = torch.autograd.grad(score.sum(), ruled.leaves, allow_unused=True) if score.requires_grad else ()
        self.on_pass(len(inputs))
        pairs = zip(ruled.leaves, given or [None] * len(ruled.leaves), strict=True)
        gradients = [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in pairs]
        value, gradient = (torch.cat(part)[: len(inputs)].detach().to(self.dtype) for part in (ruled.leaves, gradients))
        ruled.leaves.clear()
        for values in (gradient, score.detach()):
            if not bool(torch.isfinite(values.sum())):
                self._require_finite(values.reshape(len(inputs), -1), inputs, target)
        return value, gradient, score.detach()

    def run(self, inputs: torch.Tensor, target: Target, ruled: Ruled) -> torch.Tensor:
        """The logits (N, K, ...) of one pass under rules, with their autograd graph where gradients are on.

        For what differentiates with respect to nodes; for at most `rows` rows, as `gradient`.
        """
        return self._graph_run(inputs, target.held, ruled)

    def passes(self, count: int) -> Iterator[torch.Tensor]:
        """Cut `count` rows into index tensors of nearly equal length, at most `rows`.

        A lone last row would run in other, slower kernels.
        """
        pieces = -(-count // self.rows)
        for piece in range(pieces):
            yield torch.arange(count * piece // pieces, count * (piece + 1) // pieces, device=self.device)

    def head(self, inputs: torch.Tensor) -> Head:
        """What the model applies after the logits: found in the graph, or declared where there is no graph to look at.

        Raises UsageError when the sidecar declares what the graph does not end in.
        """
        try:
            found = self.engine(tuple(inputs.shape[1:])).head
        except UnsupportedOp:
            if self.format != "onnx":
                raise
            return self.declared or "none"
        if found == "none" and self.declared:
            raise UsageError(
                f"{self.path}: the sidecar says that the output went through a {self.declared}, but the graph does not "
                'end in one over the classes: write activation = "none" under [output] to explain what it outputs'
            )
        return found

    def in_full(self) -> "Model":
        """The same model without bfloat16."""
        exact = copy(self)
        exact.lowered, exact._engines, exact._prepared, exact._runtime = False, {}, {}, Runtime(exact)
        return exact

    # -- at a node -----------------------------------------------------------------------------------------------

    def at(self, node: str, shape: tuple[int, ...]) -> "Model":
        """The same model from a node on, for inputs of this shape: its input is what `activation` returns.

        Give a target whose `held` is `arguments` of the inputs. Raises UsageError for a name that is no node.
        """
        source = Cut(self.source, node, self._samples(shape), self.dtype)
        cut = Model(self.path, source, self.device, self.dtype, lowered=self.lowered)
        cut.input, cut.input_dtype, cut.output, cut.declared = node, self.dtype, self.output, self.declared
        cut.rows, cut.on_pass = self.rows, self.on_pass
        cut._alone = self.engine(shape).batch == 1
        return cut

    def activation(self, node: str, inputs: torch.Tensor) -> torch.Tensor:
        """The value of a node, (N, ...) -> (N, ...). Raises UsageError for a name that is no node."""
        key = (node, *inputs.shape[1:])
        if key not in self._engines:
            whole = self.engine(tuple(inputs.shape[1:]))
            graph = passes.until(whole.graph, node)
            self._engines[key] = engine.make(graph, node, self.device, whole.batch, stripped=False)
        ready = self._engines[key]
        with torch.no_grad(), self._within_tables():
            return torch.cat([ready(*self._arguments(inputs[rows], {})) for rows in self.passes(len(inputs))])

    def arguments(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """All inputs of the file by name, row by row, as the file takes them."""
        names = [spec.name for spec in self.source.inputs]
        return dict(zip(names, self._arguments(inputs, {}), strict=True))

    def imported(self, shape: tuple[int, ...]) -> tuple[fx.GraphModule, dict[str, Sample]]:
        """The file's own graph, all its outputs in it, and the samples that it was built for; for `formats.save`."""
        wanted = self._wanted(shape)
        return batching.graph_of(wanted, self.engine(shape).batch), dict(wanted.samples)

    # -- engines -------------------------------------------------------------------------------------------------

    def engine(self, shape: tuple[int, ...]) -> Engine:
        """The graph, ready to run, for samples of this shape; built once. Raises UnsupportedOp, ModelError."""
        if shape not in self._engines:
            try:
                self._engines[shape] = batching.build(self._wanted(shape))
            except (UnsupportedOp, ModelError) as error:
                raise type(error)(f"{self.path}: {error}") from error
        return self._engines[shape]

    def _samples(self, shape: tuple[int, ...]) -> dict[str, Sample]:
        samples = {}
        taken = (*shape[1:], shape[0]) if self.channels_last_input else shape
        taken = (math.prod(taken),) if self.flat_input else taken
        for spec in self.source.inputs:
            if spec.name == self.input:
                samples[spec.name] = Sample(taken, self.input_dtype or spec.dtype)
            elif spec.name in self.fixed:
                value = self.fixed[spec.name]
                samples[spec.name] = Sample(tuple(value.shape), value.dtype)
        return samples

    def _wanted(self, shape: tuple[int, ...]) -> batching.Wanted:
        """What the graph for samples of this shape is built for."""
        given = (self.path, self.source, self._samples(shape), self.input, self.output)
        return batching.Wanted(*given, self.device, self.dtype, self.lowered, self._alone)

    def _arguments(self, inputs: torch.Tensor, held: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        arguments = []
        for spec in self.source.inputs:
            if spec.name == self.input:
                taken = inputs.movedim(1, -1) if self.channels_last_input else inputs
                arguments.append(taken.flatten(1) if self.flat_input else taken)
            elif spec.name in held:
                arguments.append(held[spec.name])
            else:
                value = self.fixed[spec.name]
                arguments.append(value.expand(len(inputs), *value.shape))
        return arguments

    def ruled(
        self,
        inputs: torch.Tensor,
        choose: Choice,
        method: str,
        advice: str = "",
        *,
        at: str | None = None,
        norms: Norms = "run",
    ) -> Ruled:
        """The graph for these inputs with a method's rules, for `gradient`; from the node `at` on, for `gradient_at`.

        Raises UnsupportedOp, naming the node; UsageError for a name that is no node.
        """
        shape = tuple(inputs.shape[1:])
        ready = self.engine(shape)
        graph = ready.run
        if at is not None or norms != "run":
            key = (shape, at, norms)
            if key not in self._prepared:
                self._prepared[key] = engine.prepared(ready, at, self.device, norms=norms, lowered=self.lowered)
            graph, at = self._prepared[key]
        try:
            return Ruled(graph, self.input, choose, method, advice, at)
        except UnsupportedOp as error:
            raise UnsupportedOp(f"{self.path}: {error}") from error

    def broadcasts(self, inputs: torch.Tensor) -> bool:
        """Whether activations of one row stand for those of all: no node merges the batch with another dimension."""
        ready = self.engine(tuple(inputs.shape[1:]))
        return ready.batch is None and not merges_batch(ready.run, dependent(ready.run, self.input))

    def _graph_run(
        self,
        inputs: torch.Tensor,
        held: Mapping[str, torch.Tensor],
        ruled: Callable[..., Any] | None = None,
        references: torch.Tensor | None = None,
    ) -> torch.Tensor:
        arguments = self._arguments(inputs, held)
        if references is not None:
            arguments += self._arguments(references, {name: value[: len(references)] for name, value in held.items()})
        with self._within_tables():
            return self.engine(tuple(inputs.shape[1:]))(*arguments, run=ruled)

    @contextmanager
    def _within_tables(self) -> Iterator[None]:
        """Make an index beyond the model's tables, such as an unknown token, the input's error; others the model's."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError) as error:
            what = next(iter(str(error).strip().splitlines()), "")[:300]
            if re.search("out of (range|bounds)", what) is None:
                raise ModelError(f"{self.path}: the graph does not run on this input: {what}") from error
            raise InputError(f"{self.path}: the input holds an index beyond the model's tables: {what}") from error

    def _require_finite(self, values: torch.Tensor, inputs: torch.Tensor, target: Target) -> None:
        """Raise NonFiniteError, naming the node, for the first row of values (N, ...) with a NaN or an infinity."""
        bad = (~torch.isfinite(values)).reshape(len(values), -1).any(1).nonzero().flatten()
        if not len(bad):
            return
        head, ready = self.head(inputs), self.engine(tuple(inputs.shape[1:]))
        rows = bad[:1].expand(ready.batch or 1)
        one = target.take(rows)
        names = [spec.name for spec in self.source.inputs]
        arguments = [x.cpu() for x in self._arguments(inputs[rows], one.held)]

        def score(logits: torch.Tensor) -> torch.Tensor:
            return select(logits.reshape(len(rows), *ready.output_shape).to(self.device), one, head)

        graph = passes.place(ready.logits, torch.device("cpu"), channels_last=False)
        where = first_nonfinite(graph, dict(zip(names, arguments, strict=True)), self.input, score)
        raise NonFiniteError(f"{self.path}: {where}")
