"""explain: a model and inputs to a run file. A plain function; nothing is printed, progress goes to a callback.

plan = Plan(Config(model="net.onnx", inputs=("photos",), method="saliency", out="run.h5"))
summary = explain(plan)
"""

import itertools
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attrcli import __version__, baselines, data, methods, targets
from attrcli.config import Config
from attrcli.errors import AttrcliWarning, InputError, ModelError, UsageError
from attrcli.methods._method import Attribution
from attrcli.plan import Plan, Sample
from attrcli.score import Head, Target, apply_head, select
from attrcli.store import RunFile, RunWriter, Status

__all__ = ["Config", "Plan", "Summary", "explain"]

Array = npt.NDArray[Any]
Columns = dict[str, Array]
Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


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


@dataclass
class _Batch:
    """The inputs of one cell of the grid and what became of them; `notes` are messages, also of rows that are ok."""

    rows: slice
    ids: list[str]
    samples: list[Sample]
    labels: Array
    todo: list[int]
    notes: list[str]

    def good(self) -> list[int]:
        """The places of what can be explained, as far as is known."""
        return [place for place, note in enumerate(self.notes) if not note]


def explain(plan: Plan, progress: Progress = lambda stage, done, total: None) -> Summary:
    """Run a plan: read ahead, compute, write behind, batch by batch on a fixed grid of the sorted inputs.

    An interrupted run leaves `OUT.part`; running the same plan again finishes it. Raises AttrcliError; an input that
    fails is a row with status error.
    """
    ids, force = [record.id for record in plan.records], plan.config.force
    with _gathered(), RunWriter.open(plan.config.out, ids, plan.layout(), _attributes(plan), force=force) as writer:
        summary = Summary(Path(plan.config.out), len(ids))
        summary.added, summary.removed = len(writer.added), len(writer.removed)
        grid = [slice(i, min(i + plan.batch_size, len(ids))) for i in range(0, len(ids), plan.batch_size)]
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as behind:
            ahead = [reader.submit(_read, plan, writer, rows) for rows in grid[:2]]
            pending: Future[None] | None = None
            for number, rows in enumerate(grid):
                samples = ahead.pop(0).result()
                if number + 2 < len(grid):
                    ahead.append(reader.submit(_read, plan, writer, grid[number + 2]))
                if samples and (batch := _batch(plan, writer, rows, samples)).todo:
                    columns, status = _compute(plan, batch)
                    if pending is not None:
                        pending.result()
                    pending = behind.submit(_write, writer, batch, columns, status)
                    summary.computed += len(batch.todo)
                    failed = [i for i in batch.todo if status[i] == Status.ERROR]
                    summary.errors += [(batch.ids[i], _named(batch.ids[i], batch.notes[i])) for i in failed]
                    if failed and plan.config.fail_fast:
                        pending.result()
                        raise InputError(f"{summary.errors[0][1]} (--fail-fast)")
                progress("explain", rows.stop, len(ids))
            if pending is not None:
                pending.result()
        writer.finish()
    summary.resumed = summary.rows - summary.computed
    _summarise(plan, summary)
    return summary


def _named(name: str, message: str) -> str:
    return message if name in message else f"{name}: {message}"


@contextmanager
def _gathered() -> Iterator[None]:
    """Show what several batches warn of in the same words, but for numbers, once when they end, and how many did."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AttrcliWarning)
            yield
    finally:
        alike: dict[str, list[warnings.WarningMessage]] = {}
        for each in caught:
            alike.setdefault(re.sub(r"\d+", "", str(each.message)), []).append(each)
        for first, *more in alike.values():
            text = f"{first.message} (and likewise in {len(more)} more batches)" if more else str(first.message)
            warnings.warn_explicit(text, first.category, first.filename, first.lineno)


def _read(plan: Plan, writer: RunWriter, rows: slice) -> list[Sample]:
    """The inputs of one cell of the grid; none of them where all rows are finished and no file changed."""
    records = plan.records[rows]
    if all(_unchanged(plan, record, writer.sha256(rows.start + i)) for i, record in enumerate(records)):
        return []
    return [plan.read(record) for record in records]


def _unchanged(plan: Plan, record: data.Record, sha256: str) -> bool:
    """Whether an image file is known to be the one explained: its hash is that of its bytes, decoding tells no more."""
    alone = plan.preprocess.kind == "image" and record.key is None and record.row is None
    if not sha256 or not alone or not record.path.is_file():
        return False
    with suppress(UsageError):  # reading it says why
        return data.sha256_of(record.path) == sha256
    return False


def _batch(plan: Plan, writer: RunWriter, rows: slice, samples: list[Sample]) -> _Batch:
    """The samples with what is known to be wrong with each, and which rows are missing or come from changed inputs."""
    labels = plan.labels[rows]
    todo = [
        i
        for i, sample in enumerate(samples)
        if writer.status[rows.start + i] != Status.OK or writer.sha256(rows.start + i) != sample.sha256
    ]
    notes = [_problem(plan, sample, int(label)) for sample, label in zip(samples, labels, strict=True)]
    return _Batch(rows, [record.id for record in plan.records[rows]], samples, labels, todo, notes)


def _problem(plan: Plan, sample: Sample, label: int) -> str:
    """Why a sample cannot be explained, as far as is known without the model; '' where nothing is."""
    if sample.message:
        return sample.message
    if sample.x.shape != plan.shape:
        given, wanted = ("x".join(map(str, shape)) or "one number" for shape in (sample.x.shape, plan.shape))
        return f"its shape, channels first, is {given}; the others and the model take {wanted}"
    if plan.wanted.kind == "label" and label == data.UNKNOWN_LABEL:
        return "--target label: this input has no label"
    return ""


# -- one batch -----------------------------------------------------------------------------------------------------


def _compute(plan: Plan, batch: _Batch) -> tuple[Columns, Array]:
    """Columns and status of one batch, whole or not at all, so that a row's numbers do not depend on an interruption.

    The place of a sample that cannot be explained is filled with a copy of another: the rest then has the very numbers
    that it would have had without it.
    """
    columns: Columns = {"label": batch.labels, "sample_sha256": np.array([sample.sha256 for sample in batch.samples])}
    status = np.full(len(batch.samples), int(Status.ERROR), dtype=np.uint8)
    while (good := batch.good()) and not set(good).isdisjoint(batch.todo):
        places = [i if i in good else good[0] for i in range(len(batch.samples))]
        try:
            made, notes = _explain_rows(plan, batch, places)
        except torch.OutOfMemoryError:
            _halve(plan)
        except InputError as error:
            failing = _failing(plan, batch, good) or dict.fromkeys(good, str(error))
            for i, message in failing.items():
                batch.notes[i] = message
        else:
            for i in good:
                status[i], batch.notes[i] = Status.OK, notes[i]
            return columns | made, status
    return columns, status


def _halve(plan: Plan) -> None:
    if plan.model.rows == 1:
        raise ModelError("out of memory on the device with one row per pass")
    plan.model.rows = plan.explained.rows = plan.model.rows // 2
    torch.cuda.empty_cache()


def _failing(plan: Plan, batch: _Batch, good: Sequence[int]) -> dict[int, str]:
    """Which samples cannot be explained, and why: as their scores tell, else as explaining each of them alone tells."""
    found: dict[int, str] = {}
    for run in (_scored, _explain_rows):
        for i in good:
            try:
                run(plan, batch, [i])
            except InputError as error:
                found[i] = str(error)
        if found:
            break
    return found


@dataclass(frozen=True)
class _Scored:
    """Inputs (N, ...) of the model, or of a node, with logits (N, K, ...), target and score (N,), float64."""

    inputs: torch.Tensor
    logits: torch.Tensor
    head: Head
    target: Target
    score: torch.Tensor


def _scored(plan: Plan, batch: _Batch, places: Sequence[int]) -> _Scored:
    """Run some samples of a batch forward. Raises NonFiniteError naming the node."""
    model = plan.model
    inputs = plan.tensor([batch.samples[i].x for i in places])
    logits = model.logits(inputs)
    head = model.head(inputs)
    labels = torch.from_numpy(batch.labels[list(places)].astype(np.int64))
    target = targets.resolve(plan.wanted, plan.config.score, logits, head, labels)  # type: ignore[arg-type]
    seeds = [baselines.seed_of(batch.ids[i], plan.config.seed) for i in places]
    target = replace(target, seed=torch.tensor(seeds, device=inputs.device))
    score = select(logits, target, head).double()
    if not bool(torch.isfinite(score).all()):
        model.scores(inputs, target)  # raises, naming the node
    return _Scored(inputs, logits, head, target, score)


def _explain_rows(plan: Plan, batch: _Batch, places: Sequence[int]) -> tuple[Columns, Sequence[str]]:
    """Explain some samples of a batch: columns (N, ...) and a note for each."""
    run, baseline = _scored(plan, batch, places), None
    if plan.baseline is not None:
        raws = [plan.baseline(batch.samples[i].raw, batch.ids[i], plan.config.seed) for i in places]
        baseline = plan.tensor([plan.encode(raw) for raw in raws])
    if plan.config.at is not None:
        held = replace(run.target, held=plan.model.arguments(run.inputs))
        run = replace(run, target=held, inputs=plan.model.activation(plan.config.at, run.inputs))
        baseline = None if baseline is None else plan.model.activation(plan.config.at, baseline)
    result = plan.method.attribute(plan.explained, run.inputs, run.target, baseline)
    if not bool(torch.isfinite(result.values.sum())):
        raise InputError(f"{plan.config.method} made a value that is not finite")
    prediction = apply_head(run.logits, run.head)
    columns = {
        "attribution": result.values,
        "prediction": prediction.flatten(1) if prediction.dim() > 1 else prediction[:, None],
        "target": targets.classes_of(run.target),
        "score": run.score,
        **_completeness(plan, result, run, baseline),
    }
    notes = result.note or [""] * len(places)
    return {name: value.detach().cpu().numpy() for name, value in columns.items()}, notes


def _completeness(
    plan: Plan, result: Attribution, run: _Scored, baseline: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """baseline_score, completeness_delta = sum of the attribution - (score - baseline_score), and the remainder."""
    reference = result.baseline_score
    if reference is None and baseline is not None:
        shared = plan.baseline is not None and plan.baseline.shared and not run.target.held
        logits = plan.explained.logits(baseline[:1] if shared else baseline, run.target.held)
        logits = logits.expand(len(run.score), *logits.shape[1:])
        reference = select(logits, run.target, plan.explained.head(baseline)).double()
        same = (run.inputs == baseline).flatten(1).all(1)
        reference = torch.where(same, run.score, reference)  # a row alone rounds unlike the same row among others
    found: dict[str, torch.Tensor] = {}
    if reference is not None:
        found["baseline_score"] = reference
        if "complete" in plan.method.axioms:
            total = result.values.flatten(1).sum(1, dtype=torch.float64)
            found["completeness_delta"] = total - (run.score - reference)
    if result.remainder is not None:
        found["remainder"] = result.remainder
    return found


def _write(writer: RunWriter, batch: _Batch, columns: Columns, status: Array) -> None:
    """Write the rows that are to do, in runs of neighbours."""
    todo = batch.todo
    breaks = [0, *(k for k in range(1, len(todo)) if todo[k] != todo[k - 1] + 1), len(todo)]
    for first, last in itertools.pairwise(breaks):
        low, high = todo[first], todo[last - 1] + 1
        part = {name: values[low:high] for name, values in columns.items()}
        rows = slice(batch.rows.start + low, batch.rows.start + high)
        writer.write(rows, part, status[low:high], batch.notes[low:high])


# -- what the run file says ----------------------------------------------------------------------------------------


def _attributes(plan: Plan) -> dict[str, Any]:
    """The attributes of the run file (design: schema attrcli/1)."""
    config, model = plan.config, plan.model
    return {
        "method": config.method,
        "options": {o.name: getattr(plan.method, o.name) for o in methods.description(config.method).options},
        "preprocess": plan.preprocess.as_dict(),
        "target": config.target,
        "score": config.score,
        "baseline": {"name": plan.baseline.name} if plan.baseline else None,
        "input": model.input,
        "output": config.output,
        "at": config.at,
        "files": _files(plan),
        "inputs_root": str(plan.collection.root),
        "model": str(plan.path),
        "model_sha256": model.sha256,
        "model_format": model.format,
        "seed": config.seed,
        "batch_size": plan.batch_size,
        "threads": torch.get_num_threads(),
        "device": model.device.type,
        "precision": config.precision,
        "versions": {
            "attrcli": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnx", "onnxruntime", "numpy", "h5py", "pillow")},
        },
        "argv": sys.argv,
    }


def _files(plan: Plan) -> dict[str, str]:
    """SHA-256 of every file besides model and inputs."""
    files: dict[str, str | Path] = {}
    if plan.baseline is not None and plan.baseline.file is not None:
        files["baseline"] = plan.baseline.file
    if plan.config.labels is not None:
        files["labels"] = plan.config.labels
    fixed = {f"fix {name}": value for name, value in plan.config.fix.items()}
    files |= {name: value for name, value in fixed.items() if value != "zero"}
    return dict.fromkeys(fixed, "zero") | {name: data.sha256_of(Path(path)) for name, path in files.items()}


# -- the finished run ----------------------------------------------------------------------------------------------


def _summarise(plan: Plan, summary: Summary) -> None:
    """Counts, accuracy and gaps from the finished file; warns when the accuracy says that preprocessing is wrong."""
    with RunFile(summary.out) as run:
        summary.ok = int((run.status == Status.OK).sum())
        classes = _classes(plan)
        if classes:
            summary.accuracy = _accuracy(run, classes)
        if summary.accuracy:
            _warn_near_chance(summary.accuracy, classes)
        if "complete" in plan.method.axioms:
            gaps = run.gaps()
            summary.gaps = gaps[~np.isnan(gaps)].tolist()


def _classes(plan: Plan) -> int:
    """How many classes the output tells apart; 0 when it is no classifier's."""
    if plan.output_shape in ((), (1,)):
        return 2 if plan.model.head(plan.zeros()) == "sigmoid" else 0
    return plan.output_shape[0] if len(plan.output_shape) == 1 else 0


def _accuracy(run: RunFile, classes: int) -> tuple[int, int] | None:
    """How many of the labelled rows that are ok the model is right on; None where there are none."""
    right = count = 0
    for rows in run.blocks():
        label = run["label"][rows]
        used = (run.status[rows] == Status.OK) & (label != data.UNKNOWN_LABEL)
        prediction = run["prediction"][rows]
        chosen = prediction.argmax(1) if prediction.shape[1] > 1 else prediction[:, 0] > 0.5
        right += int((chosen == label)[used].sum())
        count += int(used.sum())
    return (right, count) if count and classes else None


def _warn_near_chance(accuracy: tuple[int, int], classes: int) -> None:
    """Warn when the accuracy on labelled inputs is within two standard errors of guessing."""
    (right, count), chance = accuracy, 1 / classes
    if count >= 20 and right / count <= chance + 2 * (chance * (1 - chance) / count) ** 0.5:
        warnings.warn(
            f"the model is right on {right} of {count} labelled inputs, about what guessing gives: the preprocessing "
            "(size, range, mean, std, channels) is probably not the one it was trained with",
            AttrcliWarning,
            stacklevel=2,
        )
