"""A configuration resolved: model bound, inputs listed, method made; what a run will do, before it does it."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attrcli import aside, baselines, data, methods, outputs, sequences, sidecar, targets
from attrcli import model as models
from attrcli.config import Config
from attrcli.errors import AttrcliWarning, InputError, ModelError, UnsupportedOp, UsageError, WeightError
from attrcli.formats.spec import TensorSpec
from attrcli.graph.engine import Engine, free_memory
from attrcli.methods._method import Method, Ruling, shape_of
from attrcli.preprocess import CHANNELS, Preprocess
from attrcli.samples import Reader, Sample
from attrcli.score import SCORES, select
from attrcli.sending import Sent
from attrcli.store import EXTRAS, Layout, RunWriter

__all__ = ["Estimate", "Plan", "Sample"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """What a run would do: `--dry-run`. `forward` and `backward` count passes of one row over the whole run."""

    files: int
    inputs: int
    input_shape: tuple[int, ...]
    attribution_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    batch_size: int
    forward: int
    backward: int
    file_bytes: int
    memory_bytes: int


class Plan:
    """All that a run needs, ready to run; nothing is written yet.

    `records` are the inputs, `shape` is that of one model input, channels first, `explained_shape` that of what is
    explained, it or the node of `--at`; `attribution_shape` is that of one row.
    Raises AttrcliError for all that can be known to be wrong before the first pass.
    """

    def __init__(self, config: Config) -> None:
        if config.score not in SCORES:
            raise methods.unknown("score", config.score, SCORES)
        self.config, self.path = config, Path(config.model)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.model = models.load(
            self.path,
            device=config.device,
            precision=config.precision,
            threads=config.threads,
            trusted=config.trust_model,
        )
        self.preprocess = self._preprocess()
        self.method: Method = methods.load(config.method, self._options())
        if config.reverse_complement:
            sequences.require_strands(self.preprocess, self.at)
        self._bind()
        self.collection = self._collect()
        self.records = self.collection.records
        aside.require_apart(config, self.preprocess.kind, self.records)
        self._name_columns()
        self.labels = aside.labels(config, self.collection, self.preprocess.labels)
        self.wanted = targets.parse(config.target, self.preprocess.labels)
        self.shape = self._sample_shape()
        sequences.require_equal(self.preprocess, self.records, self.shape[-1])
        self.baseline = self._baseline()
        self._settle_fixed()
        self._bound()
        self.attribution_shape = self._attribution_shape()
        self.batch_size = self._batch_size()
        self.model.rows = self.explained.rows = self.batch_size
        self.output_shape = self._output_shape()
        self._require_scores()
        self._require_target()

    # -- what is explained ---------------------------------------------------------------------------------------

    def _options(self) -> Mapping[str, Any]:
        """The method's options; `--at` is one of those that read a node inside the model."""
        config = self.config
        if config.at is None or "node" not in methods.description(config.method).needs:
            return config.options
        if "node" in config.options:
            raise UsageError(f"--at {config.at} and -o node={config.options['node']} say the same: leave one out")
        return {**config.options, "node": config.at}

    def _spec(self) -> TensorSpec:
        """What the file says of the explained input; `bind` refuses a name that is not there."""
        inputs = self.model.source.inputs
        return next((spec for spec in inputs if spec.name == self.config.input), inputs[0])

    def _preprocess(self) -> Preprocess:
        embedded = sidecar.parse_embedded(self.model.source.metadata.get("attrcli.toml"), str(self.path))
        shape, channels = self._spec().shape, "RGB"
        if shape is not None:
            channels = "L" if len(shape) == 4 and 1 in (shape[1], shape[3]) else "RGB"
        elif self.config.preprocess is not None and (own := sidecar.find(self.path, None, embedded)) is not None:
            channels = own.channels  # a preset says nothing of channels
        found = sidecar.find(self.path, self.config.preprocess, embedded, channels)
        if found is not None:
            return self._whole(found)
        kind = data.guess_kind(self.config.inputs)
        if kind == "sequence":
            told = sequences.SIDECAR.format(sidecar=self.path.with_suffix(".toml"), model=self.path)
            raise UsageError(f"{self.path} does not say how sequences become numbers: {told}")
        if kind == "image":
            raise UsageError(
                f"{self.path} has no preprocessing information, and without it a picture of an attribution means "
                "nothing. Either say --preprocess imagenet or --preprocess unit, or write a sidecar and edit it: "
                f"attrcli inspect {self.path} --write-sidecar"
            )
        return self._whole(Preprocess(kind))

    def _whole(self, p: Preprocess) -> Preprocess:
        """With the dtype of the file for an input of whole numbers, such as tokens, and the length of a sequence."""
        spec = self._spec()
        p = sequences.settled(p, spec.shape and spec.shape[1:], self.config.length, self.path)
        if p.kind == "image" or spec.shape is None or spec.dtype not in (torch.int32, torch.int64):
            return p
        told = p.as_dict()
        told["input"]["dtype"] = str(spec.dtype).removeprefix("torch.")
        return sidecar.from_mapping(told, str(self.path), None)

    def _bind(self) -> None:
        dtype = getattr(torch, self.preprocess.dtype)
        self.input_dtype = self.model.dtype if dtype.is_floating_point else dtype
        specs = {spec.name: spec for spec in self.model.source.inputs}
        if unknown := [name for name in self.config.fix if name not in specs]:
            known = models.describe(self.model.source.inputs)
            raise UsageError(f"--fix {unknown[0]}: {self.path} has no such input; its inputs: {known}")
        self.fixed = {
            name: aside.fixed(name, value, specs.get(name), self.model.dtype) for name, value in self.config.fix.items()
        }
        self._bind_to(self.model, self.fixed)
        if self.at is None and "gradient" in self.method.needs and not dtype.is_floating_point:
            raise UsageError(
                f"{self.config.method} needs a gradient, and the input is {self.preprocess.dtype}: explain at a node "
                "of the graph, the output of the embedding, with --at NODE, or use a perturbation method (occlusion)"
            )

    def _bind_to(self, model: models.Model, fixed: Mapping[str, torch.Tensor]) -> None:
        declared = self.preprocess.activation
        model.bind(
            input=self.config.input,
            output=self.config.output,
            fixed=fixed,
            dtype=getattr(torch, self.preprocess.dtype),
            declared=None if declared == "none" else declared,  # type: ignore[arg-type]
            layout="NHWC" if self.preprocess.channels_last else "NCHW",
            flat=self.preprocess.flat,
        )

    def _settle_fixed(self) -> None:
        """Leave a batch axis of 1 out of fixed arrays where the file declares no shapes and takes them only without."""
        without = {name: value[0] if value.shape[:1] == (1,) else value for name, value in self.fixed.items()}
        if self._spec().shape is not None or all(without[name] is value for name, value in self.fixed.items()):
            return
        for fixed in (self.fixed, without):
            trial = models.Model(self.path, self.model.source, self.model.device, self.model.dtype)
            self._bind_to(trial, fixed)
            with warnings.catch_warnings(), suppress(ModelError):
                warnings.simplefilter("ignore", AttrcliWarning)
                if trial.engine(self.shape).batch is None:
                    self.model = trial
                    return

    def _bound(self) -> None:
        """Tell the model what the darkest and the brightest pixel are in its own terms."""
        p = self.preprocess
        if p.kind == "image" and self.input_dtype.is_floating_point:
            ends = [p.normalize(np.full((1, 1, CHANNELS[p.channels]), raw, np.float32)).ravel() for raw in (0, 255)]
            low, high = (torch.from_numpy(end(*ends)).reshape(-1, 1, 1) for end in (np.minimum, np.maximum))
            self.model.bounds = (low, high)

    def _collect(self) -> data.Collection:
        spec, rank = self._spec().shape, self.preprocess.sample_rank
        rank = len(spec) - 1 if rank is None and spec is not None else rank
        kind, columns = self.preprocess.kind, self.preprocess.columns
        found = data.collect(self.config.inputs, kind, columns=columns, sample_rank=rank)
        return replace(found, records=found.records[: self.config.limit])

    def _name_columns(self) -> None:
        """Read the columns of a table by the names that the first one has, where the sidecar names none.

        Raises UsageError where the model takes another number of them.
        """
        p, spec = self.preprocess, self._spec().shape
        found = data.first_header(self.records) if p.kind == "table" and p.columns is None else None
        if found is None:
            return
        path, columns = found
        if spec is not None and len(spec) == 2 and spec[1] not in (None, len(columns)):
            raise UsageError(
                f"{path}: {len(columns)} columns besides id and label ({', '.join(columns[:20])}), and "
                f"the model takes {spec[1]}; name those that it takes, in order, in a sidecar: [input] columns = [...]"
            )
        told = p.as_dict()
        told["input"]["columns"] = list(columns)
        self.preprocess = sidecar.from_mapping(told, str(self.path), None)

    def _baseline(self) -> baselines.Baseline | None:
        p = self.preprocess
        p = replace(p, size=self.shape) if p.kind == "array" else p
        return aside.baseline(self.config, p, self.method.needs)

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _sample_shape(self) -> tuple[int, ...]:
        """Shape of one model input, channels first: from the sidecar, else the file, else the first readable input."""
        p, spec = self.preprocess, self._spec().shape
        declared = tuple(size for size in spec[1:] if size is not None) if spec is not None else ()
        shape = p.sample_shape or (declared if spec is not None and len(declared) == len(spec) - 1 else None)
        if p.kind == "array" and p.size is None and shape:
            self.preprocess = replace(p, size=shape)  # for those who read the inputs again
        self._reader = Reader(self.preprocess)
        if shape is not None:
            return p.channels_first(shape)
        first = ""
        for record in self.records:
            sample = self._reader.peek(record)
            if not sample.message:
                return sample.x.shape
            first = first or sample.message
        raise InputError(f"none of the {len(self.records)} inputs can be read: {first}")

    def _attribution_shape(self) -> tuple[int, ...]:
        """Shape of one row of attributions: the input's, or that of the node of `--at`."""
        self.explained, self.explained_shape = self.model, self.shape
        if self.at:
            self.explained = self.model.at(self.at, self.shape)
            self.explained_shape = tuple(self.model.activation(self.at, self.zeros()).shape[1:])
        return shape_of(self.method, self.explained_shape)

    @property
    def at(self) -> str | None:
        """The node that is explained in place of the input; None where `--at` is the method's own business."""
        return None if "node" in self.method.needs else self.config.at

    def zeros(self) -> torch.Tensor:
        """One model input of zeros, as a batch."""
        return torch.zeros(1, *self.shape, device=self.model.device, dtype=self.input_dtype)

    @cached_property
    def _engine(self) -> Engine | None:
        """The graph; None for an ONNX file whose graph cannot be imported, where forward passes are all that it takes.

        Raises UnsupportedOp where they are not.
        """
        try:
            return self.model.engine(self.shape)
        except UnsupportedOp:
            if "gradient" in self.method.needs or self.at is not None or self.model.format != "onnx":
                raise
            return None
        except ModelError as error:
            if self._spec().shape is not None or isinstance(error, WeightError):
                raise
            held = "; a --fix array holds one sample, with or without a batch axis of 1" if self.fixed else ""
            raise ModelError(f"{error} ({self._assumed()}{held})") from error

    def _assumed(self) -> str:
        """What was taken for the input of a file that does not say it, and how to say otherwise."""
        p, size = self.preprocess, "x".join(map(str, self.shape))
        if p.kind != "array" or p.size is not None:
            return f"for {p.dtype} inputs of {size}; if that is not what the model takes, the sidecar is wrong"
        return (
            f"for {p.dtype} inputs of {size}, as the first array is, taken for one sample; to say otherwise, write a "
            'sidecar: [input] kind = "array", size = [...] of one sample, dtype = "int64" for whole numbers'
        )

    def _batch_size(self) -> int:
        """Rows per pass: as asked, else as recorded in an earlier file (another would move results within rounding).

        Else half a gigabyte of activations, at most a quarter of the free memory, at most 64.
        """
        if self.config.batch_size != "auto":
            return int(self.config.batch_size)
        if str(self._recorded.get("batch_size", "")).isdecimal():
            return max(1, int(self._recorded["batch_size"]))
        return max(1, min(64, min(512 << 20, free_memory() // 4) // max(1, self._row_bytes())))

    @cached_property
    def _recorded(self) -> Mapping[str, Any]:
        """The attributes of the run file that this run goes on with; none where it starts one."""
        return (None if self.config.force else RunWriter.peek(self.config.out)) or {}

    def _row_bytes(self) -> int:
        """Bytes that one row's pass keeps."""
        return self._engine.activation_bytes if self._engine else 400 * math.prod(self.shape)

    def _output_shape(self) -> tuple[int, ...]:
        if self._engine is not None:
            return self._engine.output_shape
        return tuple(self.model.logits(self.zeros()).shape[1:])

    def _require_target(self) -> None:
        """Raise UsageError for a target or score that does not fit the output."""
        zeros = torch.zeros(1, *self.output_shape)
        head = self.model.head(self.zeros())
        none = torch.zeros(1, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttrcliWarning)  # of a mask that is empty for zeros
            try:
                target = targets.resolve(self.wanted, self.config.score, zeros, head, none)  # type: ignore[arg-type]
            except UsageError as error:
                if self._spec().shape is not None or self.preprocess.kind != "array":
                    raise
                raise UsageError(f"{error} ({self._assumed()})") from error
        select(zeros, target, head)

    def _require_scores(self) -> None:
        """Raise ModelError for an output that cannot be explained; warn of one that may be meant otherwise.

        A run that goes on has looked at its inputs before, and need not decode them again.
        """
        samples = [self._reader.peek(record) for record in self.records[: 0 if self._recorded else 8]]
        good = [sample.x for sample in samples if not sample.message and sample.x.shape == self.shape]
        inputs = self.tensor(good) if good else self.zeros()
        outputs.examine(self.model, inputs, len(self.preprocess.labels or ()))
        if "gradient" in self.method.needs and self.at is None:
            outputs.require_gradient(self.model, inputs[:1])
        if isinstance(self.method, Ruling):
            self.method.ruled(self.explained, torch.zeros(1, *self.explained_shape))

    def estimate(self) -> Estimate:
        """What running the plan would do."""
        forward, backward = (count * self.baseline_count for count in self.method.passes(self.explained_shape))
        layout, count = self.layout(), len(self.records)
        columns = layout.columns(count, max(len(os.fsencode(record.id)) for record in self.records))
        return Estimate(
            files=len({record.path for record in self.records}),
            inputs=count,
            input_shape=self.shape,
            attribution_shape=self.attribution_shape,
            output_shape=self.output_shape,
            batch_size=self.batch_size,
            forward=count * forward,
            backward=count * backward,
            file_bytes=sum(math.prod(shape) * dtype.itemsize for shape, dtype in columns.values()),
            memory_bytes=self._row_bytes() * self.batch_size,
        )

    @property
    def baseline_count(self) -> int:
        """How often a sample is explained: once for each baseline of a set, on each strand that counts."""
        count = len(self.baseline.fills) if self.baseline else 1
        return 2 * count if self.config.reverse_complement else count

    @property
    def hypothetical(self) -> bool:
        """Whether the run says what each letter of a sequence would contribute."""
        given = {"multipliers"} <= self.method.gives and "baseline" in self.method.needs
        return given and self.preprocess.kind == "sequence" and self.at is None

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, record: data.Record) -> Sample:
        """Read one input and preprocess it; what goes wrong is a message."""
        return self._reader.read(record)

    def encode(self, raw: Array) -> Array:
        """Raw values to one model input, channels first."""
        return self._reader.encode(raw)

    def tensor(self, arrays: Sequence[Array]) -> torch.Tensor:
        """Model inputs to a batch on the device."""
        return Sent(arrays, self.input_dtype, self.model.device).arrived()

    def layout(self) -> Layout:
        """Shapes of one row of the run file."""
        shape = self.attribution_shape
        letters = self.preprocess.kind == "sequence" and self.at is None
        known = {1: ("feature",), 2: ("letter" if letters else "channel", "position"), 3: ("channel", "y", "x")}
        dims = known.get(len(shape), tuple(f"axis_{i}" for i in range(len(shape))))
        has = {"standard_error": "standard_error" in self.method.gives, "hypothetical": self.hypothetical}
        extras = tuple(name for name in EXTRAS if has[name])
        kind = "f8" if self.config.precision == "float64" else "f4"
        return Layout(shape, self.output_shape or (1,), dims, kind, extras)
