"""One batch of a run: its inputs read, what became of each, and the columns of the run file that they make."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr

from attrcli import baselines, data, targets
from attrcli.errors import InputError, ModelError
from attrcli.methods._method import Attribution
from attrcli.model import Model
from attrcli.plan import Plan, Sample
from attrcli.score import Head, Target, apply_head, select
from attrcli.store import Status

Array = npt.NDArray[Any]
Columns = dict[str, Array]

COMPARED = 4
"""Rows of the first batch that are explained in float32 as well, where the run is in bfloat16."""


@dataclass
class Batch:
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


def problem(plan: Plan, sample: Sample, label: int) -> str:
    """Why a sample cannot be explained, as far as is known without the model; '' where nothing is."""
    if sample.message:
        return sample.message
    if sample.x.shape != plan.shape:
        given, wanted = ("x".join(map(str, shape)) or "one number" for shape in (sample.x.shape, plan.shape))
        return f"its shape, channels first, is {given}; the others and the model take {wanted}"
    if plan.wanted.kind == "label" and label == data.UNKNOWN_LABEL:
        return "--target label: this input has no label"
    return ""


def compute(plan: Plan, batch: Batch) -> tuple[Columns, Array]:
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


def _failing(plan: Plan, batch: Batch, good: Sequence[int]) -> dict[int, str]:
    """Which samples cannot be explained, and why: as their scores tell, else as explaining each of them alone tells."""
    found: dict[int, str] = {}
    for run in (scored, _explain_rows):
        for i in good:
            try:
                run(plan, batch, [i])
            except InputError as error:
                found[i] = str(error)
        if found:
            break
    return found


@dataclass(frozen=True)
class Scored:
    """Inputs (N, ...) of the model, or of a node, with logits (N, K, ...), target and score (N,), float64."""

    inputs: torch.Tensor
    logits: torch.Tensor
    head: Head
    target: Target
    score: torch.Tensor


def scored(plan: Plan, batch: Batch, places: Sequence[int]) -> Scored:
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
    return Scored(inputs, logits, head, target, score)


def _explain_rows(plan: Plan, batch: Batch, places: Sequence[int]) -> tuple[Columns, Sequence[str]]:
    """Explain some samples of a batch: columns (N, ...) and a note for each."""
    run, references = _prepared(plan, batch, places)
    result = _attribute(plan, plan.explained, run, references)
    if not bool(torch.isfinite(result.values.sum())):
        raise InputError(f"{plan.config.method} made a value that is not finite")
    prediction = apply_head(run.logits, run.head)
    columns = {
        "attribution": result.values,
        "prediction": prediction.flatten(1) if prediction.dim() > 1 else prediction[:, None],
        "target": targets.classes_of(run.target),
        "score": run.score,
        **_completeness(plan, result, run, references),
    }
    if result.standard_error is not None:
        columns["standard_error"] = result.standard_error
    notes = result.note or [""] * len(places)
    return {name: value.detach().cpu().numpy() for name, value in columns.items()}, notes


def _prepared(plan: Plan, batch: Batch, places: Sequence[int]) -> tuple[Scored, list[torch.Tensor]]:
    """What a method is given for some samples: inputs, or the values of the node of `--at`, and baselines of each."""
    run, references = scored(plan, batch, places), _references(plan, batch, places)
    if plan.at is not None:
        held = replace(run.target, held=plan.model.arguments(run.inputs))
        run = replace(run, target=held, inputs=plan.model.activation(plan.at, run.inputs))
        references = [plan.model.activation(plan.at, reference) for reference in references]
    return run, references


def _references(plan: Plan, batch: Batch, places: Sequence[int]) -> list[torch.Tensor]:
    """The baselines (N, ...) of some samples, one tensor for each of the set; none where the method needs none."""
    if plan.baseline is None:
        return []
    asked = places[:1] if plan.baseline.shared else places
    sets = [plan.baseline(batch.samples[i].raw, batch.ids[i], plan.config.seed) for i in asked]
    made = [plan.tensor([plan.encode(raw) for raw in raws]) for raws in zip(*sets, strict=True)]
    return [reference.expand(len(places), *reference.shape[1:]) for reference in made]


def _attribute(plan: Plan, model: Model, run: Scored, references: list[torch.Tensor]) -> Attribution:
    """Explain with the one baseline, or with each of a set in turn: then all is a mean over the set."""
    method = plan.method
    if "baselines" in method.needs:
        return method.attribute(model, run.inputs, run.target, torch.stack(references, 1))
    if len(references) < 2:
        return method.attribute(model, run.inputs, run.target, references[0] if references else None)
    values, remainder = torch.zeros(1, dtype=torch.float64, device=run.inputs.device), None
    notes: list[set[str]] = [set() for _ in run.score]
    for reference in references:
        result = method.attribute(model, run.inputs, run.target, reference)
        values = values + result.values.double() / len(references)
        if result.remainder is not None:
            remainder = (0 if remainder is None else remainder) + result.remainder / len(references)
        for found, note in zip(notes, result.note or (), strict=False):
            found.add(note)
    return Attribution(values, remainder=remainder, note=tuple("; ".join(sorted(found - {""})) for found in notes))


def rank_correlation(plan: Plan, batch: Batch, columns: Columns) -> float:
    """Spearman's correlation of a batch's attributions with those of float32, a mean over its first good rows."""
    places = [i for i in batch.todo if np.isfinite(columns["attribution"][i]).all()][:COMPARED]
    run, references = _prepared(plan, batch, places)
    exact = _attribute(plan, plan.explained.in_full(), run, references).values.cpu().numpy()
    pairs = zip(exact, columns["attribution"][places], strict=True)
    return float(np.mean([spearmanr(one, other, axis=None).statistic for one, other in pairs]))


def _completeness(
    plan: Plan, result: Attribution, run: Scored, references: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """baseline_score, the remainder, and completeness_delta = sum + remainder - (score - baseline_score)."""
    reference = result.baseline_score
    if reference is None and references:
        reference = torch.stack([_at_baseline(plan, run, each) for each in references]).mean(0)
    found: dict[str, torch.Tensor] = {}
    if reference is not None:
        found["baseline_score"] = reference
        if "complete" in plan.method.axioms:
            total = result.values.flatten(1).sum(1, dtype=torch.float64)
            total = total if result.remainder is None else total + result.remainder
            found["completeness_delta"] = total - (run.score - reference)
    if result.remainder is not None:
        found["remainder"] = result.remainder
    return found


def _at_baseline(plan: Plan, run: Scored, baseline: torch.Tensor) -> torch.Tensor:
    """The scores of baselines (N, ...), float64 (N,)."""
    shared = plan.baseline is not None and plan.baseline.shared and not run.target.held
    logits = plan.explained.logits(baseline[:1] if shared else baseline, run.target.held)
    logits = logits.expand(len(run.score), *logits.shape[1:])
    scores = select(logits, run.target, plan.explained.head(baseline)).double()
    same = (run.inputs == baseline).flatten(1).all(1)
    return torch.where(same, run.score, scores)  # a row alone rounds unlike the same row among others
