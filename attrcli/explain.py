"""explain: a model and inputs to a run file. A plain function; nothing is printed, progress goes to a callback.

plan = Plan(Config(model="net.onnx", inputs=("photos",), method="saliency", out="run.h5"))
summary = explain(plan)
"""

import hashlib
import itertools
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attrcli import __version__, data, methods
from attrcli.batch import Array, Batch, Columns, compute, rank_correlation
from attrcli.config import Config
from attrcli.errors import AttrcliWarning, InputError, UsageError
from attrcli.plan import Plan, Sample
from attrcli.store import RunFile, RunWriter, Status

__all__ = ["Config", "Plan", "Summary", "explain"]

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


@dataclass
class Summary:
    """What a run did. `gaps` are |gap| / sum of |attribution| of the rows that are ok; `errors` are (id, message).

    `rank_correlation` is that of bfloat16 with float32, where the run was in the former.
    """

    out: Path
    rows: int
    ok: int = 0
    computed: int = 0
    resumed: int = 0
    added: int = 0
    removed: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    accuracy: tuple[int, int] | None = None
    rank_correlation: float | None = None
    gaps: list[float] = field(default_factory=list)


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
                    plan.explained.on_pass = _within(plan, rows, progress)
                    columns, status = compute(plan, batch)
                    if (
                        plan.config.precision == "bf16"
                        and summary.rank_correlation is None
                        and "attribution" in columns
                    ):
                        summary.rank_correlation = rank_correlation(plan, batch, columns)
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


def _within(plan: Plan, rows: slice, progress: Progress) -> Callable[[int], None]:
    """Progress within a batch, from the passes that the method said it takes."""
    count = rows.stop - rows.start
    forward = plan.method.passes(plan.attribution_shape)[0] * plan.baseline_count
    done = 0

    def passed(some: int) -> None:
        nonlocal done
        done += some
        progress("explain", rows.start + min(done // max(forward, 1), count - 1), len(plan.records))

    return passed


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


def _batch(plan: Plan, writer: RunWriter, rows: slice, samples: list[Sample]) -> Batch:
    """The samples with what is known to be wrong with each, and which rows are missing or come from changed inputs."""
    labels = plan.labels[rows]
    todo = [
        i
        for i, sample in enumerate(samples)
        if writer.status[rows.start + i] != Status.OK or writer.sha256(rows.start + i) != sample.sha256
    ]
    notes = [_problem(plan, sample, int(label)) for sample, label in zip(samples, labels, strict=True)]
    return Batch(rows, [record.id for record in plan.records[rows]], samples, labels, todo, notes)


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


def _write(writer: RunWriter, batch: Batch, columns: Columns, status: Array) -> None:
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
        "baseline": {"name": plan.baseline.name, "count": len(plan.baseline.fills)} if plan.baseline else None,
        "input": model.input,
        "output": config.output,
        "at": config.at,
        "reverse_complement": config.reverse_complement,
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
    return dict.fromkeys(fixed, "zero") | {name: _hash(Path(path)) for name, path in files.items()}


def _hash(path: Path) -> str:
    """SHA-256 of a file; of a directory, of the hashes and names of all that lies in it."""
    if not path.is_dir():
        return data.sha256_of(path)
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    listed = "".join(f"{data.sha256_of(file)} {file.relative_to(path)}\n" for file in inside)
    return hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()


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
