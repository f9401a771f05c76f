"""explain: a model and inputs to a run file. A plain function; nothing is printed, progress goes to a callback.

ready = plan(Config(model="net.onnx", inputs=("photos",), method="saliency", out="run.h5"))
summary = explain(ready)
"""

import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from attrcli import data
from attrcli.batch import Array, Batch, Columns, compute, problem, rank_correlation, send
from attrcli.config import Config
from attrcli.errors import AttrcliWarning, InputError, UsageError
from attrcli.plan import Plan, Sample
from attrcli.provenance import attributes
from attrcli.sending import Sent
from attrcli.store import RunFile, RunWriter, Status, require_place

__all__ = ["Config", "Plan", "Summary", "explain", "plan"]

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


@dataclass
class Summary:
    """What a run did. `gaps` are |gap| / sum of |attribution| of the rows that are ok; `errors` are (id, message).

    `zero` counts the rows computed whose attribution is zero everywhere; `rank_correlation` is that of bfloat16 with
    float32, where the run was in the former.
    """

    out: Path
    rows: int
    ok: int = 0
    computed: int = 0
    resumed: int = 0
    added: int = 0
    removed: int = 0
    zero: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    accuracy: tuple[int, int] | None = None
    rank_correlation: float | None = None
    gaps: list[float] = field(default_factory=list)


def plan(config: Config) -> Plan:
    """The plan of a run whose file can be written. Raises AttrcliError."""
    require_place(Path(config.out))
    return Plan(config)


def explain(plan: Plan, progress: Progress = lambda stage, done, total: None) -> Summary:
    """Run a plan: read ahead, compute, write behind, batch by batch on a fixed grid of the sorted inputs.

    An interrupted run leaves `OUT.part`; running the same plan again finishes it. Raises AttrcliError; an input that
    fails is a row with status error.
    """
    ids, force = [record.id for record in plan.records], plan.config.force
    with _gathered(), RunWriter.open(plan.config.out, ids, plan.layout(), attributes(plan), force=force) as writer:
        summary = Summary(Path(plan.config.out), len(ids))
        summary.added, summary.removed = len(writer.added), len(writer.removed)
        grid = [slice(i, min(i + plan.batch_size, len(ids))) for i in range(0, len(ids), plan.batch_size)]
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as behind:
            ahead = [reader.submit(_read, plan, writer, rows) for rows in grid[:2]]
            pending: Future[None] | None = None
            for number, rows in enumerate(grid):
                read = ahead.pop(0).result()
                if number + 2 < len(grid):
                    ahead.append(reader.submit(_read, plan, writer, grid[number + 2]))
                if read and (batch := _batch(plan, writer, rows, *read)).todo:
                    plan.explained.on_pass = _within(plan, rows, progress)
                    columns, status = compute(plan, batch)
                    if pending is not None:
                        pending.result()
                    pending = behind.submit(_write, writer, batch, columns, status)
                    _count(plan, summary, batch, columns, status)
                    if summary.errors and plan.config.fail_fast:
                        pending.result()
                        raise InputError(f"{summary.errors[0][1]} (--fail-fast)")
                progress("explain", rows.stop, len(ids))
            if pending is not None:
                pending.result()
        writer.finish()
    summary.resumed = summary.rows - summary.computed
    _summarise(plan, summary)
    _warn_of_zeros(plan, summary)
    return summary


def _count(plan: Plan, summary: Summary, batch: Batch, columns: Columns, status: Array) -> None:
    """Add what became of a batch to the summary."""
    good, failed = ([i for i in batch.todo if status[i] == each] for each in (Status.OK, Status.ERROR))
    summary.computed += len(batch.todo)
    summary.zero += sum(not columns["attribution"][i].any() for i in good)
    summary.errors += [(batch.ids[i], _named(batch.ids[i], batch.notes[i])) for i in failed]
    if good and plan.config.precision == "bf16" and summary.rank_correlation is None:
        summary.rank_correlation = rank_correlation(plan, batch, columns)


def _within(plan: Plan, rows: slice, progress: Progress) -> Callable[[int], None]:
    """Progress within a batch, from the passes that the method said it takes."""
    count = rows.stop - rows.start
    forward = plan.method.passes(plan.explained_shape)[0] * plan.baseline_count
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


def _read(plan: Plan, writer: RunWriter, rows: slice) -> tuple[list[Sample], Sent] | None:
    """The inputs of one cell of the grid, sent to the device; None where all rows are finished and no file changed."""
    records = plan.records[rows]
    if all(_unchanged(plan, record, writer.sha256(rows.start + i)) for i, record in enumerate(records)):
        return None
    samples = [plan.read(record) for record in records]
    return samples, send(plan, samples)


def _unchanged(plan: Plan, record: data.Record, sha256: str) -> bool:
    """Whether an image file is known to be the one explained: its hash is that of its bytes, decoding tells no more."""
    alone = plan.preprocess.kind == "image" and record.key is None and record.row is None
    if not sha256 or not alone or not record.path.is_file():
        return False
    with suppress(UsageError):  # reading it says why
        return data.sha256_of(record.path) == sha256
    return False


def _batch(plan: Plan, writer: RunWriter, rows: slice, samples: list[Sample], sent: Sent) -> Batch:
    """The samples with what is known to be wrong with each, and which rows are missing or come from changed inputs."""
    labels = plan.labels[rows]
    todo = [
        i
        for i, sample in enumerate(samples)
        if writer.status[rows.start + i] != Status.OK or writer.sha256(rows.start + i) != sample.sha256
    ]
    notes = [problem(plan, sample, int(label)) for sample, label in zip(samples, labels, strict=True)]
    return Batch(rows, [record.id for record in plan.records[rows]], samples, sent, labels, todo, notes)


def _write(writer: RunWriter, batch: Batch, columns: Columns, status: Array) -> None:
    """Write the rows that are to do, in runs of neighbours."""
    todo = batch.todo
    breaks = [0, *(k for k in range(1, len(todo)) if todo[k] != todo[k - 1] + 1), len(todo)]
    for first, last in itertools.pairwise(breaks):
        low, high = todo[first], todo[last - 1] + 1
        part = {name: values[low:high] for name, values in columns.items()}
        rows = slice(batch.rows.start + low, batch.rows.start + high)
        writer.write(rows, part, status[low:high], batch.notes[low:high])


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


def _warn_of_zeros(plan: Plan, summary: Summary) -> None:
    """Warn of attributions that are zero everywhere: a picture of nothing is easily taken for one of no importance."""
    if summary.zero:
        warnings.warn(
            f"{summary.zero} of {summary.computed} attributions are zero everywhere: there {plan.config.method} finds "
            "nothing that the score depends on (a saturated or dead unit, an input equal to the baseline)",
            AttrcliWarning,
            stacklevel=2,
        )


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
