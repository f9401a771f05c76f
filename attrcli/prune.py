"""prune: a model and inputs to masks, one for each input, and to masked models. Plain functions; nothing is printed.

wanted = Wanted("prune_grad", sparsity=0.9)
summary = prune(plan(wanted, model="net.onnx", inputs=("photos",), out="pruned"), wanted)
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from attrcli import data, methods, render, targets
from attrcli import model as models
from attrcli.batch import Batch, problem, scored, send
from attrcli.config import Config
from attrcli.errors import InputError, ModelError, UsageError
from attrcli.masked import Exporter
from attrcli.methods import _pruning as pruning
from attrcli.plan import Plan
from attrcli.provenance import attributes
from attrcli.score import apply_head
from attrcli.store import Lock, MaskFile, MaskWriter, Status, is_mask_file, require_folder, writing_masks

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""

Criterion = Literal["prune_grad", "prune_int", "greedy", "random"]
Export = Literal["each", "union", "intersection"]

MASKS, PICTURE, MODELS, PARTIAL = "masks.h5", "jaccard.png", "models", ".pruning-"
LOCK = f"{MASKS}.lock"
COMPARED = 1000
"""Inputs whose masks are compared, pair by pair."""


@dataclass(frozen=True)
class Wanted:
    """How to prune, and what is written besides the masks. Raises UsageError for what does not fit.

    `options` are those of the criterion's method, as `methods.load` takes them; `greedy` and `random` have those of
    prune_grad. Three of them have a name of their own here.
    """

    criterion: str = "prune_grad"
    sparsity: float | None = None
    max_output_change: float | None = None
    ops: str | None = None
    export: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.criterion not in get_args(Criterion):
            raise UsageError(f"--criterion {self.criterion}: choose from {', '.join(get_args(Criterion))}")
        if self.export is not None and self.export not in get_args(Export):
            raise UsageError(f"--export {self.export}: choose from {', '.join(get_args(Export))}")
        own = methods.description(self.method)
        for name in self.options:
            if name not in [option.name for option in own.options]:
                raise methods.unknown_option(replace(own, name=self.criterion), name)
            if getattr(self, name, None) is not None:
                raise UsageError(f"--{name.replace('_', '-')} and -o {name}= say the same: leave one out")
        methods.load(self.method, self.chosen)

    @property
    def method(self) -> str:
        """The method whose options the criterion has."""
        return self.criterion if self.criterion == "prune_int" else "prune_grad"

    @property
    def chosen(self) -> dict[str, Any]:
        """All options that were given."""
        named = {"sparsity": self.sparsity, "max_output_change": self.max_output_change, "ops": self.ops}
        return {name: value for name, value in named.items() if value is not None} | dict(self.options)


@dataclass
class Summary:
    """What was written. `errors` are (id, message); `classes` and `jaccard` (K, K) the mean of pairs by class.

    `exports` are the files of masked models, `bytes` and `seconds` of the model and of the first of them.
    """

    folder: Path
    rows: int
    neurons: int = 0
    sparsity: float = 0.0
    change: float = 0.0
    agreement: float = 0.0
    measured_on: str = ""
    kept: dict[str, float] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    jaccard: list[list[float]] = field(default_factory=list)
    compared: int = 0
    exports: list[Path] = field(default_factory=list)
    bytes: tuple[int, int] = (0, 0)
    seconds: tuple[float, float] = (0.0, 0.0)
    parameters: tuple[int, int] = (0, 0)


def plan(wanted: Wanted, **options: Any) -> Plan:
    """The plan of a run: model, inputs and targets as `explain` has them; `out` is the folder. Raises AttrcliError."""
    folder = Path(options["out"])
    _require_free(folder, force=bool(options.get("force")))
    require_folder(folder)
    made = Plan(Config(**{**options, "method": wanted.method, "options": wanted.chosen, "out": str(folder / MASKS)}))
    for name in made.config.inputs:
        if os.path.isdir(name) and f"{folder.resolve()}/".startswith(f"{Path(name).resolve()}/"):
            raise UsageError(f"--out {folder} lies in the folder of inputs {name}; choose a place beside it")
    if wanted.export is not None and made.config.precision == "bf16":
        raise UsageError("--export writes the network as it was saved, not in bfloat16; leave out --precision bf16")
    return made


def _require_free(folder: Path, *, force: bool) -> None:
    """Raise UsageError for a folder that is no folder, holds what is not ours, or (without `force`) a finished run."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: there is a file of that name; give a folder")
    names = os.listdir(folder) if folder.is_dir() else []
    there = [name for name in names if name != LOCK and not name.startswith(PARTIAL)]
    if there and not is_mask_file(folder / MASKS):
        raise UsageError(f"--out {folder}: holds other files, such as {min(there)}; choose a new or an empty folder")
    if there and not force:
        raise UsageError(f"--out {folder}: holds the masks of an earlier run; choose another folder, or --force")


def prune(plan: Plan, wanted: Wanted, progress: Progress = lambda stage, done, total: None) -> Summary:
    """Prune for each input; write masks, their comparison and masked models, all of them or nothing.

    All is made in a hidden folder inside the folder, and moved when it is there: interrupted, a run leaves nothing, and
    starts anew; what a killed one left is removed. Raises AttrcliError, also where another process prunes into the
    folder; an input that fails is a row with status error.
    """
    folder = Path(plan.config.out).parent
    net = pruning.Network(plan.model, plan.zeros(), vars(plan.method)["ops"], "prune")
    if not net.layers:
        raise ModelError(f"{plan.path}: the graph has no nonlinearity, and so no neurons that could be pruned")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, plan), tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as partial_folder:
            run = _Run(plan, wanted, net, Path(partial_folder), progress)
            run.write()
            _move(Path(partial_folder), folder)
    except OSError as error:
        if error.errno is None:
            raise
        raise UsageError(f"--out {folder}: {(error.strerror or str(error)).lower()}; choose another folder") from error
    run.summary.folder = folder
    run.summary.exports = [folder / MODELS / path.name for path in run.summary.exports]
    return run.summary


@contextmanager
def _alone(folder: Path, plan: Plan) -> Iterator[None]:
    """Exclusive use of a folder, cleared of what killed runs left. Raises UsageError where another process has it."""
    lock = Lock(folder / MASKS)
    try:
        _require_free(folder, force=plan.config.force)  # again: another process may have finished since
        for left in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def _move(made: Path, folder: Path) -> None:
    """Put what was made in the place of an earlier run's files; the masks come last."""
    if is_mask_file(folder / MASKS):
        with MaskFile(folder / MASKS) as earlier:
            for name in earlier.attributes["files"]:
                (folder / name).unlink(missing_ok=True)
    for path in sorted(made.rglob("*"), key=lambda path: path.name == MASKS):
        if path.is_file():
            place = folder / path.relative_to(made)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)


class _Run:
    """One run: its network, the columns of its file, and what is kept of the masks for exports."""

    def __init__(self, plan: Plan, wanted: Wanted, net: pruning.Network, folder: Path, progress: Progress) -> None:
        self.plan, self.wanted, self.net, self.folder, self.progress = plan, wanted, net, folder, progress
        self.options = vars(plan.method)
        self.most = self.options["max_output_change"]
        self.share = pruning.check("prune", self.options["ops"], self.options["sparsity"], self.most)
        self.shapes = self._shapes()
        self.summary = Summary(folder, len(plan.records), sum(int(np.prod(s)) for s in self.shapes.values()))
        self.columns: dict[str, Array] = {}
        self.together: dict[str, Array] = {}
        self.inputs = plan.zeros()
        self.exporter = Exporter(plan, self.shapes, folder / MODELS) if wanted.export is not None else None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one input's neurons, layer by layer."""
        zeros = self.plan.zeros()
        target = models.Target(torch.zeros(1, dtype=torch.long, device=zeros.device))
        with torch.no_grad():
            self.net.logits(zeros, target, record=True)
        return {name: tuple(value.shape[1:]) for name, value in self.net.gradients(torch.zeros(()))[0].items()}

    def write(self) -> None:
        """Masks and columns, batch by batch; then the comparison, the picture and the models of all inputs."""
        ids, count = [record.id for record in self.plan.records], len(self.plan.records)
        files = [MASKS, *([PICTURE] if count > 1 else []), *(f"{MODELS}/{name}" for name in self._exported(ids))]
        told = attributes(self.plan) | {
            "criterion": self.wanted.criterion,
            "export": self.wanted.export,
            "sparsity": self.share,
            "layers": self.net.layers,
            "files": files,
        }
        with writing_masks(self.folder / MASKS, count, self.shapes, told) as writer:
            for start in range(0, count, self.plan.batch_size):
                self._batch(writer, slice(start, min(start + self.plan.batch_size, count)))
                self.progress("prune", min(start + self.plan.batch_size, count), count)
            self._finish(writer, ids)
        if self.exporter is not None and self.together:
            self.exporter.write(f"{self.wanted.export}{self.plan.path.suffix}", self.together, self.inputs)
        if self.exporter is not None:
            e, s = self.exporter, self.summary
            s.exports, s.bytes, s.seconds, s.parameters = e.written, e.bytes, e.seconds, e.parameters

    def _exported(self, ids: Sequence[str]) -> list[str]:
        if self.wanted.export is None:
            return []
        suffix = self.plan.path.suffix
        return (
            [f"{data.escape(name)}{suffix}" for name in ids]
            if self.wanted.export == "each"
            else [f"{self.wanted.export}{suffix}"]
        )

    def _batch(self, writer: MaskWriter, rows: slice) -> None:
        """Prune for the inputs of a batch; where one fails, for each by itself."""
        plan = self.plan
        samples, labels = [plan.read(record) for record in plan.records[rows]], plan.labels[rows]
        notes = [problem(plan, sample, int(label)) for sample, label in zip(samples, labels, strict=True)]
        ids = [record.id for record in plan.records[rows]]
        batch = Batch(rows, ids, samples, send(plan, samples), labels, [], notes)
        good = batch.good()
        try:
            if good:
                self._keep(writer, batch, good)
        except InputError:
            for place in good:
                try:
                    self._keep(writer, batch, [place])
                except InputError as error:
                    batch.notes[place] = str(error)
        self._column("label", rows, [*range(len(samples))], labels)
        self._column("sample_sha256", rows, [*range(len(samples))], np.array([s.sha256 for s in samples]), "U64")
        for place, note in enumerate(batch.notes):
            if note:
                name = batch.ids[place]
                self.summary.errors.append((name, note if name in note else f"{name}: {note}"))
        texts = np.array([note[:200] for note in batch.notes])
        self._column("message", rows, [*range(len(samples))], texts, "U200")
        status = np.array([Status.ERROR if note else Status.OK for note in batch.notes], "u1")
        self._column("status", rows, [*range(len(samples))], status)

    def _column(self, name: str, rows: slice, places: Sequence[int], values: Array, kind: Any = None) -> None:
        """Put values of some places of a batch into a column; what is never put is NaN, or zero, or empty."""
        if name not in self.columns:
            kind = kind or values.dtype
            fill: Any = np.nan if np.dtype(kind).kind == "f" else "" if np.dtype(kind).kind == "U" else 0
            self.columns[name] = np.full((len(self.plan.records), *values.shape[1:]), fill, kind)
        self.columns[name][[rows.start + place for place in places]] = values

    def _keep(self, writer: MaskWriter, batch: Batch, places: Sequence[int]) -> None:
        """Prune some samples of a batch, write their masks and note what came of it. Raises InputError."""
        [run] = scored(self.plan, batch, places)
        for rows in self.net.passes(len(places)):
            inputs, target = run.inputs[rows], run.target.take(rows)
            done, dead = self._pruned(inputs, target)
            chosen = [places[row] for row in rows.tolist()]
            for at, place in enumerate(chosen):
                masks = {name: mask[at].cpu().numpy() for name, mask in done.masks.items()}
                writer.put_masks(batch.rows.start + place, masks)
                if self.exporter is not None:
                    self._export(batch.ids[place], masks, (inputs[at : at + 1], done.after[at : at + 1]))
            kept = torch.stack([mask.flatten(1).sum(1) for mask in done.masks.values()], 1)
            before, after = (
                pruning.probability(self.net, inputs, target, logits) for logits in (done.before, done.after)
            )
            self.summary.measured_on = pruning.measure(self.net, inputs, done.before)
            found = {
                "kept": kept,
                "dead_kept": dead,
                "sparsity": done.sparsity,
                "change": done.change,
                "target": targets.classes_of(target),
                "target_before": before,
                "target_after": after,
                "prediction": _flat(apply_head(done.before, run.head)),
                "prediction_pruned": _flat(apply_head(done.after, run.head)),
            }
            for name, value in found.items():
                self._column(name, batch.rows, chosen, value.detach().cpu().numpy())

    def _pruned(self, inputs: torch.Tensor, target: models.Target) -> tuple[pruning.Pruned, torch.Tensor]:
        """What is left for the rows of one pass, and the share of neurons of value 0 among what is kept (N,)."""
        criterion, net = self.wanted.criterion, self.net
        if criterion == "greedy":
            done = pruning.prune_greedily(net, inputs, target, self.share, self.most)
        else:
            score: pruning.Score = pruning.gradient_scores if criterion == "prune_grad" else pruning.random_scores
            if criterion == "prune_int":
                score = partial(pruning.integrated_scores, steps=self.options["steps"])
            done = pruning.prune(net, inputs, target, score, self.share, self.most)
        with torch.no_grad():
            net.logits(inputs, target, record=True)
        values, _ = net.gradients(torch.zeros(()))
        both = [((values[name] == 0) & mask).flatten(1).sum(1) for name, mask in done.masks.items()]
        kept = sum(mask.flatten(1).sum(1) for mask in done.masks.values())
        return done, sum(both) / torch.as_tensor(kept).clamp_min(1).double()

    def _export(self, name: str, masks: Mapping[str, Array], sample: tuple[torch.Tensor, torch.Tensor]) -> None:
        assert self.exporter is not None
        if self.wanted.export == "each":
            self.exporter.write(f"{data.escape(name)}{self.plan.path.suffix}", masks, *sample)
            return
        self.inputs = sample[0]
        join = np.logical_or if self.wanted.export == "union" else np.logical_and
        self.together = {
            layer: join(self.together[layer], mask) if layer in self.together else mask.copy()
            for layer, mask in masks.items()
        }

    def _finish(self, writer: MaskWriter, ids: Sequence[str]) -> None:
        """Write the columns, compare the masks, and sum up. Raises InputError where nothing could be pruned."""
        good = np.flatnonzero(self.columns["status"] == Status.OK)
        if not len(good):
            raise InputError(f"none of the {len(ids)} inputs can be pruned for: {self.summary.errors[0][1]}")
        for name, values in {"sample_id": np.array(ids), **self.columns}.items():
            writer.put(name, values)
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        shares = self.columns["kept"][good] / np.array(sizes)
        s = self.summary
        s.kept = {name: float(share) for name, share in zip(self.net.layers, shares.mean(0), strict=True)}
        s.sparsity, s.change = (float(np.mean(self.columns[name][good])) for name in ("sparsity", "change"))
        if self.columns["prediction"].shape[1] > 1:
            same = self.columns["prediction"].argmax(1) == self.columns["prediction_pruned"].argmax(1)
            s.agreement = float(same[good].mean())
        self._compare(writer, good[:COMPARED])

    def _compare(self, writer: MaskWriter, rows: Array) -> None:
        """Jaccard of each two inputs, sorted by class, and its mean by class: by label where all have one."""
        known = bool((self.columns["label"][rows] != data.UNKNOWN_LABEL).all())
        classes = self.columns["label" if known else "target"][rows].astype(int)
        rows, classes = rows[np.argsort(classes, kind="stable")], np.sort(classes, kind="stable")
        both = writer.intersections(rows)
        size = np.diag(both)
        union = size[:, None] + size[None] - both
        jaccard = np.divide(both, union, out=np.ones_like(both), where=union > 0)
        present = sorted(set(classes.tolist()))
        table = np.full((len(present), len(present)), np.nan)
        for i, one in enumerate(present):
            for j, other in enumerate(present):
                part = jaccard[np.ix_(classes == one, classes == other)]
                pairs = part[~np.eye(len(part), dtype=bool)] if i == j else part.ravel()
                table[i, j] = pairs.mean() if pairs.size else np.nan
        writer.put("jaccard", jaccard.astype("f4"))
        writer.put("jaccard_row", rows)
        writer.put("jaccard_class", np.array(present))
        writer.put("jaccard_by_class", table)
        names = self.plan.preprocess.labels or ()
        labels = [names[c] if c < len(names) else str(c) for c in present]
        s = self.summary
        s.classes, s.jaccard, s.compared = labels, table.tolist(), len(rows)
        groups = [labels[present.index(c)] for c in classes.tolist()]
        how = "label" if known else "explained class"
        caption = [
            f"Neurons kept by {self.wanted.criterion}: Jaccard of each two inputs",
            f"{len(rows)} inputs by {how}; dark is 0, bright is 1",
        ]
        if len(rows) > 1:
            render.save_png(render.matrix(jaccard, groups, caption), self.folder / PICTURE, {"attrcli": "jaccard"})


def _flat(outputs: torch.Tensor) -> torch.Tensor:
    """Outputs of any rank as (N, K)."""
    return outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]
