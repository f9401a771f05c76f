"""A loaded model: its graph in torch and, for an ONNX file, a session in ONNX Runtime; predictions, scores, gradients.

model = attrcli.model.load("net.onnx")
logits = model(batch)                                    # (N, K), as the file outputs it
gradient, score = model.gradient(batch, Target(index))   # (N, ...), (N,)
"""

# long: the one face of a model to the methods; what they call stands together

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attrcli import formats
from attrcli.errors import AttrcliWarning, InputError, ModelError, NonFiniteError, TooLarge, UnsupportedOp, UsageError
from attrcli.formats.cut import Cut
from attrcli.formats.spec import Sample, Source, describe, require_shape
from attrcli.graph import engine, passes, ties
from attrcli.graph.build import FREE
from attrcli.graph.coupling import coupled
from attrcli.graph.engine import Engine, Norms
from attrcli.graph.rules import Choice, Ruled, dependent, merges_batch
from attrcli.graph.trace import first_nonfinite
from attrcli.score import Head, Target, apply_head, select, undo_head
from attrcli.session import Session

__all__ = ["Model", "Target", "describe", "load"]

AGREEMENT = 1e-3
"""Difference between ONNX Runtime and the imported graph, of the largest logit (0.01 at least), that is an error; in a
graph that rounds, beyond what ties do."""

HALF_AGREEMENT = 1e-2
"""The same for a file in float16, whose step is 1e-3: ONNX Runtime rounds to it after each op, the graph does not."""

_COUPLED = "what it returns for one sample depends on the others of the batch"

_AS_QUANTISED = (
    "it is run as it says, with its QuantizeLinear nodes one by one; by default ONNX Runtime fuses them into integer "
    "kernels, some of which approximate (softmax), so that its own outputs may differ by some 1 %"
)

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
        self._session: Session | None = None
        self._undone: Head | None = None
        self._agreed = False
        self._coupled: bool | None = None

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
        self._coupled = None

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
                in_session = ruled is None and self._in_session(chunk, held)
                parts.append(self._session_run(chunk) if in_session else self._graph_run(chunk, others, ruled))
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
        exact.lowered, exact._engines, exact._prepared = False, {}, {}
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
        cut._coupled = self.engine(shape).batch == 1
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
        batch, samples = self.engine(shape).batch, self._samples(shape)
        graph = self.source.build(samples, self.dtype, FREE if batch is None else (batch, batch))
        graph.meta["batches"] = FREE if batch is None else (batch, batch)
        return graph, samples

    # -- engines -------------------------------------------------------------------------------------------------

    def engine(self, shape: tuple[int, ...]) -> Engine:
        """The graph, ready to run, for samples of this shape; built once. Raises UnsupportedOp, ModelError."""
        if shape not in self._engines:
            try:
                self._engines[shape] = self._build(shape)
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

    def _build(self, shape: tuple[int, ...]) -> Engine:
        samples = self._samples(shape)
        declared = next(spec for spec in self.source.inputs if spec.name == self.input).shape
        if self.input in samples:
            require_shape(declared, samples[self.input].shape)
        if declared is not None and declared[0] is not None:
            self._say_frozen(declared[0], "the file says so")
            return self._frozen(samples, declared[0])
        try:
            return self._free(samples)
        except TooLarge:  # with a frozen batch, too
            raise
        except (UnsupportedOp, ModelError) as error:
            first = error
        try:
            made = self._frozen(samples, 1)
        except (UnsupportedOp, ModelError):
            raise first from None
        self._say_frozen(1, str(first))
        return made

    def _free(self, samples: Mapping[str, Sample]) -> Engine:
        """The graph with a free batch. Raises ModelError where it has none, or where its rows are not independent."""
        graph = self.source.build(samples, self.dtype, FREE)
        shapes = graph.meta["output_shapes"]
        chosen = [shapes[self.output]] if self.output in shapes else shapes.values()
        if any(tuple(shape[:1] for shape in pair) != tuple((batch,) for batch in FREE) for pair in chosen):
            raise ModelError("the output does not keep the batch in its first dimension")
        graph.meta["batches"] = FREE
        made = engine.make(graph, self.output, self.device, None, lowered=self.lowered)
        if self._coupled is None:
            rows = [samples[name] for name in graph.meta["inputs"]]
            kinds = [self.dtype if row.dtype.is_floating_point else row.dtype for row in rows]
            self._coupled = coupled(made, [(r.shape, kind) for r, kind in zip(rows, kinds, strict=True)], self.device)
        if self._coupled:
            raise ModelError(_COUPLED)
        return made

    def _say_frozen(self, batch: int, reason: str) -> None:
        how = "samples run one by one" if batch == 1 else f"samples run {batch} by {batch}"
        what = f"{_COUPLED}; {how}" if self._coupled else f"its batch is frozen at {batch}; {how} ({reason})"
        warnings.warn(f"{self.path}: {what}", AttrcliWarning, stacklevel=2)

    def _frozen(self, samples: Mapping[str, Sample], batch: int) -> Engine:
        graph = self.source.build(samples, self.dtype, (batch, batch))
        graph.meta["batches"] = (batch, batch)
        return engine.make(graph, self.output, self.device, batch, lowered=self.lowered)

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

    # -- ONNX Runtime --------------------------------------------------------------------------------------------

    def _in_session(self, inputs: torch.Tensor, held: Mapping[str, torch.Tensor]) -> bool:
        """Whether ONNX Runtime gives the logits: for an ONNX file in float32 in which they are a tensor of the file."""
        if self.format != "onnx" or self.dtype != torch.float32 or self.lowered or held:
            return False
        try:
            made = self.engine(tuple(inputs.shape[1:]))
        except UnsupportedOp:
            return True
        return made.head == "none" or made.output_tensor is not None

    def _session_run(self, inputs: torch.Tensor) -> torch.Tensor:
        if self._session is None:
            self._session = self._open_session(tuple(inputs.shape[1:]))
        arguments = {
            spec.name: value.detach().cpu().to(spec.dtype).numpy()
            for spec, value in zip(self.source.inputs, self._arguments(inputs, {}), strict=True)
        }
        result = torch.from_numpy(self._session.run(arguments)).to(self.device, self.dtype)
        if self._undone:
            result = undo_head(result, self._undone)
        if not self._agreed:
            self._compare(inputs, result)
        return result

    def _open_session(self, shape: tuple[int, ...]) -> Session:
        declared = self.source.inputs[0].shape
        try:
            made = self.engine(shape)
            tensor, batch = made.output_tensor, made.batch
        except UnsupportedOp:
            tensor, batch, self._undone = None, declared[0] if declared else None, self.declared
        if "QuantizeLinear" in self.source.operations():
            warnings.warn(f"{self.path}: {_AS_QUANTISED}", AttrcliWarning, stacklevel=2)
        data = self.source.exposed([tensor or self.output or self.source.outputs[0].name])  # type: ignore[attr-defined, index]
        return Session(self.path, data, self.device, batch)

    def _compare(self, inputs: torch.Tensor, result: torch.Tensor) -> None:
        """Refuse to go on when ONNX Runtime and the imported graph disagree on real input."""
        self._agreed = True
        try:
            own = self._graph_run(inputs, {})
        except UnsupportedOp as error:
            warnings.warn(f"{error}; forward-only methods still run, in ONNX Runtime", AttrcliWarning, stacklevel=2)
            return
        if not bool(torch.isfinite(own).all() & torch.isfinite(result).all()):
            return  # the caller reports it, naming the node
        largest = result.abs().max().clamp_min(1e-2)
        difference = float((own - result).abs().max() / largest)
        if difference <= AGREEMENT:
            return
        run = self.engine(tuple(inputs.shape[1:])).run
        by_ties = ties.spread(run, lambda moved: self._graph_run(inputs, {}, moved), own) / float(largest)
        half = self.source.half  # type: ignore[attr-defined]
        accepted = (HALF_AGREEMENT if half else AGREEMENT) + by_ties
        what = (
            f"{self.path}: ONNX Runtime and the imported graph differ by {difference:.2g} of the largest output on "
            "real input"
        )
        if difference > accepted:
            raise ModelError(
                f"{what} (accepted: {accepted:.2g}); this is a defect of the importer, please report the model"
            )
        ties_do = f"values midway between two steps round either way, by which outputs can move by {by_ties:.2g}"
        why = "ONNX Runtime rounds each result to float16, the graph computes in float32" if half else ties_do
        warnings.warn(f"{what}: {why}", AttrcliWarning, stacklevel=2)
