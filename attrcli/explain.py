"""explain: a model and inputs to a run file. A plain function; nothing is printed, progress goes to a callback."""

import itertools
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attrcli import __version__, baselines, data, methods, preprocess, targets
from attrcli import model as models
from attrcli.errors import AttrcliWarning, InputError, ModelError, UnsupportedOp, UsageError
from attrcli.graph.engine import free_memory
from attrcli.inspect import gaps
from attrcli.methods._method import Attribution, Method
from attrcli.preprocess import Preprocess
from attrcli.score import SCORES, Target, apply_head, select
from attrcli.store import Layout, RunFile, RunWriter, Status

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Config:
    """All that a run depends on, as the user gives it; the command line and `--config` fill exactly these fields."""

    model: str
    inputs: tuple[str, ...]
    method: str
    out: str
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str = "predicted"
    score: str = "logit"
    baseline: str | None = None
    background: str | None = None
    preprocess: str | None = None
    labels: str | None = None
    input: str | None = None
    fix: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None
    at: str | None = None
    batch_size: int | None = None
    device: str = "auto"
    precision: str = "float32"
    threads: int | None = None
    seed: int = 0
    limit: int | None = None
    force: bool = False
    fail_fast: bool = False


@dataclass
class Summary:
    """What a run did. `gaps` are |gap| / sum of |attribution| of the rows that are ok; `errors` are (id, message)."""

    out: Path
    rows: int
    ok: int = 0
    computed: int = 0
    resumed: int = 0
    added: int = 0
    removed: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    accuracy: tuple[int, int] | None = None
    gaps: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Estimate:
    """What a run would do: `--dry-run`."""

    rows: int
    sample_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    batch_size: int
    forward: int
    backward: int
    file_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Sample:
    """One input, read: raw values, model input, hash; or the message of why it cannot be."""

    raw: Array
    x: Array
    sha256: str
    message: str = ""


_UNREAD = np.empty(0)


class Plan:
    """A configuration resolved: model bound, inputs listed, method made; ready to run, nothing written yet."""

    def __init__(self, config: Config) -> None:
        """Raises AttrcliError for all that can be known to be wrong before the first pass."""
        methods.description(config.method)
        if config.score not in SCORES:
            raise methods.unknown("score", config.score, SCORES)
        self.config = config
        self.path = Path(config.model)
        self.model = models.load(self.path, device=config.device, precision=config.precision, threads=config.threads)
        self.preprocess = self._preprocess()
        self.method: Method = methods.load(config.method, config.options)
        self.records = self._collect()
        self._bind()
        self.labels = self._labels()
        self.wanted = targets.parse(config.target, self.preprocess.labels)
        self.baseline = self._baseline()
        self.shape = self._sample_shape()
        self.attribution_shape = self._attribution_shape()
        self.batch_size = config.batch_size or self._recorded_batch_size() or self._automatic_batch_size()
        self.model.rows = self.explained.rows = self.batch_size
        self.output_shape = self._output_shape()

    # -- what is explained ---------------------------------------------------------------------------------------

    def _preprocess(self) -> Preprocess:
        embedded = preprocess.parse_embedded(self.model.source.metadata.get("attrcli.toml"), str(self.path))
        shape = self.model.source.inputs[0].shape
        grey = shape is not None and len(shape) == 4 and 1 in (shape[1], shape[3])
        found = preprocess.find(self.path, self.config.preprocess, embedded, "L" if grey else "RGB")
        if found is not None:
            return found
        kind = data.guess_kind(self.config.inputs)
        if kind == "image":
            raise UsageError(
                f"{self.path} has no preprocessing information, and without it a picture of an attribution means "
                "nothing. Either say --preprocess imagenet or --preprocess unit, or write a sidecar and edit it: "
                f"attrcli inspect {self.path} --write-sidecar"
            )
        return Preprocess(kind)

    def _collect(self) -> tuple[data.Record, ...]:
        spec = self.model.source.inputs[0].shape
        size = self.preprocess.size
        rank = len(size) if size is not None else len(spec) - 1 if spec is not None else None
        found = data.collect(
            self.config.inputs, self.preprocess.kind, columns=self.preprocess.columns, sample_rank=rank
        )
        self.root, self.collection = found.root, found
        if self.config.limit is not None:
            if self.config.limit < 1:
                raise UsageError(f"--limit {self.config.limit}: must be at least 1")
            self.collection = replace(found, records=found.records[: self.config.limit])
        return self.collection.records

    def _bind(self) -> None:
        declared = self.preprocess.activation
        dtype = getattr(torch, self.preprocess.dtype)
        self.input_dtype = self.model.dtype if dtype.is_floating_point else dtype
        self.model.bind(
            input=self.config.input,
            output=self.config.output,
            fixed={name: self._fixed(name, value) for name, value in self.config.fix.items()},
            dtype=dtype,
            declared=None if declared == "none" else declared,  # type: ignore[arg-type]
            layout=self.preprocess.layout if self.preprocess.kind == "image" else "NCHW",
        )
        if self.config.at is None and "gradient" in self.method.needs and not dtype.is_floating_point:
            raise UsageError(
                f"{self.config.method} needs a gradient, and the input is {self.preprocess.dtype}: explain at a node "
                "of the graph, the output of the embedding, with --at NODE, or use a perturbation method (occlusion)"
            )

    def _fixed(self, name: str, value: str) -> torch.Tensor:
        spec = next((s for s in self.model.source.inputs if s.name == name), None)
        if value != "zero":
            record = data.collect([value], "array").records[0]
            return torch.from_numpy(data.read(record, "array").values)
        if spec is None or spec.shape is None or None in spec.shape[1:]:
            raise UsageError(f"--fix {name}=zero: the file does not say the shape of '{name}'; give an array file")
        return torch.zeros([size for size in spec.shape[1:] if size is not None], dtype=spec.dtype)

    def _labels(self) -> npt.NDArray[np.uint16]:
        names = self.preprocess.labels
        if self.config.labels is not None:
            return data.labels_csv(Path(self.config.labels), self.collection, names)
        found = data.class_labels(self.collection, names)
        folders = sorted({record.label for record in self.records if record.label})
        if names and len(folders) > 1 and bool((found == data.UNKNOWN_LABEL).all()):
            warnings.warn(
                f"no class folder ({', '.join(folders[:5])}) matches a label ({', '.join(names[:5])}, ...): "
                "inputs count as unlabelled",
                AttrcliWarning,
                stacklevel=2,
            )
        if self.config.target == "label" and bool((found == data.UNKNOWN_LABEL).all()):
            raise UsageError(
                "--target label: no input has a label; use class folders named as the labels, or --labels CSV"
            )
        return found

    def _baseline(self) -> baselines.Baseline | None:
        if "baseline" not in self.method.needs:
            if self.config.baseline is not None:
                raise UsageError(f"{self.config.method} uses no baseline; leave out --baseline")
            return None
        background = Path(self.config.background) if self.config.background else None
        return baselines.resolve(self.config.baseline, self.preprocess.kind, load=self._load_raw, background=background)

    def _load_raw(self, path: Path) -> Iterator[Array]:
        """The raw inputs of a baseline or background file."""
        p = self.preprocess
        for record in data.collect(
            [os.fspath(path)], p.kind, columns=p.columns, sample_rank=len(p.size or (0,))
        ).records:
            yield p.fit(data.read(record, p.kind, channels=p.channels, columns=p.columns).values)

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _sample_shape(self) -> tuple[int, ...]:
        """Shape of one model input, from the first input that can be read."""
        first = ""
        for record in self.records[:100]:
            sample = self.read(record)
            if not sample.message:
                return sample.x.shape
            first = first or sample.message
        raise InputError(f"none of the first {min(100, len(self.records))} inputs can be read: {first}")

    def _attribution_shape(self) -> tuple[int, ...]:
        """Shape of one row of attributions: the input's, or that of the node of `--at`."""
        self.explained = self.model
        if self.config.at is None:
            return self.shape
        self.explained = self.model.at(self.config.at, self.shape)
        zero = torch.zeros(1, *self.shape, device=self.model.device, dtype=self.input_dtype)
        return tuple(self.model.activation(self.config.at, zero).shape[1:])

    def _recorded_batch_size(self) -> int | None:
        """The batch size of an earlier, unfinished or finished file: another would move results within rounding."""
        recorded = None if self.config.force else RunWriter.peek(self.config.out)
        return int(recorded["batch_size"]) if recorded else None

    def _automatic_batch_size(self) -> int:
        """Rows per pass: half a gigabyte of activations, at most a quarter of the free memory, at most 64."""
        each = max(1, self.activation_bytes())
        budget = min(512 << 20, free_memory() // 4)
        return max(1, min(64, budget // each))

    def activation_bytes(self) -> int:
        """Bytes that one row's pass keeps."""
        try:
            return self.model.engine(self.shape).activation_bytes
        except UnsupportedOp:
            self._require_forward_only()
            return int(np.prod(self.shape)) * 4 * 100

    def _output_shape(self) -> tuple[int, ...]:
        try:
            return self.model.engine(self.shape).output_shape
        except UnsupportedOp:
            self._require_forward_only()
            with torch.no_grad():
                return tuple(self.model.logits(torch.zeros(1, *self.shape, device=self.model.device)).shape[1:])

    def _require_forward_only(self) -> None:
        """An ONNX file whose graph cannot be imported still works for what needs no gradient."""
        if "gradient" in self.method.needs or self.model.format != "onnx":
            raise

    def estimate(self) -> Estimate:
        """What running the plan would do."""
        forward, backward = self.method.passes(self.attribution_shape)
        row = int(np.prod(self.attribution_shape)) + int(np.prod(self.output_shape)) + 128
        n = len(self.records)
        return Estimate(
            rows=n,
            sample_shape=self.shape,
            output_shape=self.output_shape,
            batch_size=self.batch_size,
            forward=n * forward,
            backward=n * backward,
            file_bytes=n * row * (8 if self.config.precision == "float64" else 4),
            memory_bytes=self.activation_bytes() * self.batch_size,
        )

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, record: data.Record) -> Sample:
        """Read one input and preprocess it, channels first; what goes wrong is a message."""
        p = self.preprocess
        try:
            stored = data.read(record, p.kind, channels=p.channels, columns=p.columns)
            raw = p.fit(stored.values)
            return Sample(raw, self._encode(raw), stored.sha256)
        except InputError as error:
            return Sample(_UNREAD, _UNREAD, "", str(error))

    def _encode(self, raw: Array) -> Array:
        return replace(self.preprocess, layout="NCHW").normalize(raw)

    def tensor(self, arrays: Sequence[Array]) -> torch.Tensor:
        """Model inputs to a batch on the device."""
        return torch.from_numpy(np.stack(arrays)).to(self.model.device, self.input_dtype)

    # -- what the run file says ----------------------------------------------------------------------------------

    def attributes(self) -> dict[str, Any]:
        """The attributes of the run file (design: schema attrcli/1)."""
        files = {}
        for name, path in (("baseline", self.baseline.file if self.baseline else None), ("labels", self.config.labels)):
            if path is not None and Path(path).is_file():
                files[name] = data.sha256_of(Path(path))
        for name, value in self.config.fix.items():
            files[f"fix {name}"] = "zero" if value == "zero" else data.sha256_of(Path(value))
        return {
            "method": self.config.method,
            "options": {o.name: getattr(self.method, o.name) for o in methods.description(self.config.method).options},
            "preprocess": self.preprocess.as_dict(),
            "target": self.config.target,
            "score": self.config.score,
            "baseline": {"name": self.baseline.name} if self.baseline else None,
            "input": self.model.input,
            "output": self.config.output,
            "at": self.config.at,
            "files": files,
            "inputs_root": str(self.root),
            "model": str(self.path),
            "model_sha256": self.model.sha256,
            "model_format": self.model.format,
            "seed": self.config.seed,
            "batch_size": self.batch_size,
            "threads": torch.get_num_threads(),
            "device": self.model.device.type,
            "precision": self.config.precision,
            "versions": {
                "attrcli": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "onnx", "onnxruntime", "numpy", "h5py", "pillow")},
            },
            "argv": sys.argv,
        }

    def layout(self) -> Layout:
        """Shapes of one row of the run file."""
        dims = {1: ("feature",), 2: ("channel", "position"), 3: ("channel", "y", "x")}.get(
            len(self.attribution_shape), tuple(f"axis_{i}" for i in range(len(self.attribution_shape)))
        )
        outputs = self.output_shape or (1,)
        return Layout(self.attribution_shape, outputs, dims, "f8" if self.config.precision == "float64" else "f4")


def explain(plan: Plan, progress: Progress = lambda stage, done, total: None) -> Summary:
    """Run a plan: read ahead, compute, write behind, batch by batch on a fixed grid of the sorted inputs.

    An interrupted run leaves `OUT.part`; running the same plan again finishes it. Raises AttrcliError; an input that
    fails is a row with status error.
    """
    records = plan.records
    ids = [record.id for record in records]
    with RunWriter.open(plan.config.out, ids, plan.layout(), plan.attributes(), force=plan.config.force) as writer:
        summary = Summary(Path(plan.config.out), len(records), resumed=writer.resumed)
        summary.added, summary.removed = len(writer.added), len(writer.removed)
        grid = [slice(i, min(i + plan.batch_size, len(records))) for i in range(0, len(records), plan.batch_size)]
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as behind:
            pending: Future[None] | None = None
            ahead = [reader.submit(_read_batch, plan, rows) for rows in grid[:2]]
            for number, rows in enumerate(grid):
                samples = ahead.pop(0).result()
                if number + 2 < len(grid):
                    ahead.append(reader.submit(_read_batch, plan, grid[number + 2]))
                todo = _todo(writer, rows, samples)
                if todo:
                    columns, status, messages = _compute(plan, rows, samples)
                    if pending is not None:
                        pending.result()
                    pending = behind.submit(_write, writer, rows, todo, columns, status, messages)
                    summary.computed += len(todo)
                    if plan.config.fail_fast and (status[list(todo)] == Status.ERROR).any():
                        pending.result()
                        failed = next(i for i in todo if status[i] == Status.ERROR)
                        raise InputError(f"{ids[rows.start + failed]}: {messages[failed]} (--fail-fast)")
                progress("explain", rows.stop, len(records))
            if pending is not None:
                pending.result()
        writer.finish()
    _summarise(plan, summary)
    return summary


def _summarise(plan: Plan, summary: Summary) -> None:
    """Counts, accuracy and gaps from the finished file; warns when the accuracy says that preprocessing is wrong."""
    with RunFile(summary.out) as run:
        good = run.status == Status.OK
        summary.ok = int(good.sum())
        messages = run.messages
        summary.errors = [(run.ids[i], messages[i]) for i in np.flatnonzero(run.status == Status.ERROR)]
        labelled = good & (run["label"][...] != data.UNKNOWN_LABEL)
        if labelled.any() and len(plan.output_shape) == 1:
            prediction = run["prediction"][...][labelled]
            chosen = prediction.argmax(1) if prediction.shape[1] > 1 else (prediction[:, 0] > 0.5)
            summary.accuracy = (int((chosen == run["label"][...][labelled]).sum()), int(labelled.sum()))
            _warn_near_chance(summary.accuracy, max(2, prediction.shape[1]))
        if "complete" in plan.method.axioms:
            summary.gaps = gaps(run)[good].tolist()


def _warn_near_chance(accuracy: tuple[int, int], classes: int) -> None:
    """Warn when the accuracy on labelled inputs is within two standard errors of guessing."""
    right, count = accuracy
    chance = 1 / classes
    if count >= 20 and right / count <= chance + 2 * (chance * (1 - chance) / count) ** 0.5:
        warnings.warn(
            f"the model is right on {right} of {count} labelled inputs, about what guessing gives: the preprocessing "
            "(size, range, mean, std, channels) is probably not the one it was trained with",
            AttrcliWarning,
            stacklevel=2,
        )


def _read_batch(plan: Plan, rows: slice) -> list[Sample]:
    return [plan.read(record) for record in plan.records[rows]]


def _todo(writer: RunWriter, rows: slice, samples: list[Sample]) -> list[int]:
    """Which rows of a batch are not there yet, or come from an input that changed."""
    return [
        i
        for i, sample in enumerate(samples)
        if writer.status[rows.start + i] != Status.OK or writer.sha256(rows.start + i) != sample.sha256
    ]


Columns = dict[str, Array]


def _compute(plan: Plan, rows: slice, samples: list[Sample]) -> tuple[Columns, Array, list[str]]:
    """Columns, status and messages of one batch. A sample that fails in the batch is found by running one by one."""
    count = len(samples)
    status = np.full(count, int(Status.ERROR), dtype=np.uint8)
    messages = [sample.message for sample in samples]
    labels = plan.labels[rows]
    good = []
    for i, sample in enumerate(samples):
        if sample.message:
            continue
        if sample.x.shape != plan.shape:
            messages[i] = (
                f"its shape is {_size(sample.x.shape)}, the others' is {_size(plan.shape)}; one run, one shape"
            )
        elif plan.wanted.kind == "label" and labels[i] == data.UNKNOWN_LABEL:
            messages[i] = "--target label: this input has no label"
        else:
            good.append(i)
    columns: Columns = {}
    for group in _groups(plan, rows, samples, good, messages):
        for name, values in group[1].items():
            held = columns.setdefault(name, np.zeros((count, *values.shape[1:]), dtype=values.dtype))
            held[group[0]] = values
        for i, note in zip(group[0], group[2], strict=True):
            status[i], messages[i] = Status.OK, note
    columns["label"] = labels
    columns["sample_sha256"] = np.array([sample.sha256 for sample in samples])
    return columns, status, messages


Group = tuple[list[int], Columns, Sequence[str]]


def _groups(plan: Plan, rows: slice, samples: list[Sample], good: list[int], messages: list[str]) -> Iterator[Group]:
    """The batch as one group; or, when a sample in it fails, one group for each that does not."""
    if not good:
        return
    try:
        yield good, *_explain_rows(plan, rows, samples, good)
        return
    except torch.OutOfMemoryError:
        if plan.model.rows == 1:
            raise ModelError("out of memory on the device with one row per pass") from None
        plan.model.rows //= 2
        torch.cuda.empty_cache()
        yield from _groups(plan, rows, samples, good, messages)
        return
    except InputError as error:
        if len(good) == 1:
            messages[good[0]] = str(error)
            return
    for i in good:
        yield from _groups(plan, rows, samples, [i], messages)


def _explain_rows(plan: Plan, rows: slice, samples: list[Sample], chosen: list[int]) -> tuple[Columns, Sequence[str]]:
    """Explain some samples of a batch: columns (n, ...) and a note for each."""
    model = plan.model
    inputs = plan.tensor([samples[i].x for i in chosen])
    logits = model.logits(inputs)
    head = model.head(inputs)
    labels = torch.from_numpy(plan.labels[rows][chosen].astype(np.int64))
    ids = [plan.records[rows][i].id for i in chosen]
    target = targets.resolve(plan.wanted, plan.config.score, logits, head, labels)  # type: ignore[arg-type]
    target = replace(target, seed=torch.tensor([baselines.seed_of(name, plan.config.seed) for name in ids]))
    score = select(logits, target, head).double()
    if not bool(torch.isfinite(score).all()):
        model.scores(inputs, target)  # raises, naming the node
    baseline = None
    if plan.baseline is not None:
        raws = [plan.baseline(samples[i].raw, name, plan.config.seed) for i, name in zip(chosen, ids, strict=True)]
        baseline = plan.tensor([plan._encode(raw) for raw in raws])
    if plan.config.at is not None:
        target = replace(target, held=model.arguments(inputs))
        inputs = model.activation(plan.config.at, inputs)
        baseline = None if baseline is None else model.activation(plan.config.at, baseline)
    result = plan.method.attribute(plan.explained, inputs, target, baseline)
    if not bool(torch.isfinite(result.values.sum())):
        raise InputError(f"{plan.config.method} made a value that is not finite")
    columns = {
        "attribution": result.values,
        "prediction": apply_head(logits, head).flatten(1) if logits.dim() > 1 else apply_head(logits, head)[:, None],
        "target": targets.classes_of(target),
        "score": score,
        **_completeness(plan, result, target, score, baseline),
    }
    notes = result.note or [""] * len(chosen)
    return {name: value.detach().cpu().numpy() for name, value in columns.items()}, notes


def _completeness(
    plan: Plan, result: Attribution, target: Target, score: torch.Tensor, baseline: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """baseline_score, completeness_delta = sum of the attribution - (score - baseline_score), and the remainder."""
    reference = result.baseline_score
    if reference is None and baseline is not None:
        shared = plan.baseline is not None and plan.baseline.shared and not target.held
        logits = plan.explained.logits(baseline[:1] if shared else baseline, target.held)
        reference = select(logits.expand(len(score), *logits.shape[1:]), target, plan.explained.head(baseline)).double()
    found: dict[str, torch.Tensor] = {}
    if reference is not None:
        found["baseline_score"] = reference
        if "complete" in plan.method.axioms:
            total = result.values.flatten(1).sum(1, dtype=torch.float64)
            found["completeness_delta"] = total - (score - reference)
    if result.remainder is not None:
        found["remainder"] = result.remainder
    return found


def _write(
    writer: RunWriter, rows: slice, todo: list[int], columns: Columns, status: Array, messages: list[str]
) -> None:
    """Write the rows that are to do, in runs of neighbours."""
    breaks = [0, *(k for k in range(1, len(todo)) if todo[k] != todo[k - 1] + 1), len(todo)]
    for first, last in itertools.pairwise(breaks):
        low, high = todo[first], todo[last - 1] + 1
        part = {name: values[low:high] for name, values in columns.items()}
        writer.write(slice(rows.start + low, rows.start + high), part, status[low:high], messages[low:high])


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
