"""One batch of a run: its inputs read, what became of each, and the columns of the run file that they make."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr

from attrcli import baselines, data, sequences, targets
from attrcli.errors import InputError, ModelError
from attrcli.methods._method import Attribution
from attrcli.model import Model
from attrcli.plan import Plan, Sample
from attrcli.score import Head, Target, apply_head, select
from attrcli.sending import Sent
from attrcli.store import EXTRAS, Status

Array = npt.NDArray[Any]
Columns = dict[str, Array]

COMPARED = 4
"""Rows of the first batch that are explained in float32 as well, where the run is in bfloat16."""


@dataclass
class Batch:
    """The inputs of one cell of the grid and what became of them; `notes` are messages, also of rows that are ok.

    `sent` are the inputs (N, ...) of all samples, on the device or on their way there.
    """

    rows: slice
    ids: list[str]
    samples: list[Sample]
    sent: Sent
    labels: Array
    todo: list[int]
    notes: list[str]

    def good(self) -> list[int]:
        """The places of what can be explained, as far as is known."""
        return [place for place, note in enumerate(self.notes) if not note]


def send(plan: Plan, samples: Sequence[Sample]) -> Sent:
    """Start samples on their way to the device; what cannot be explained is a copy of another there."""
    fitting = (sample.x for sample in samples if sample.x.shape == plan.shape)
    other = next(fitting, np.zeros(plan.shape))
    arrays = [sample.x if sample.x.shape == plan.shape else other for sample in samples]
    return Sent(arrays, plan.input_dtype, plan.model.device)


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
    """Inputs (N, ...) of the model, or of a node, with logits (N, K, ...), target and score (N,), float64.

    `references` are the baselines (N, ...) of each input, one tensor for each of the set.
    """

    inputs: torch.Tensor
    logits: torch.Tensor
    head: Head
    target: Target
    score: torch.Tensor
    references: list[torch.Tensor] = field(default_factory=list)


def _strands(plan: Plan, columns: torch.Tensor) -> list[torch.Tensor]:
    """Inputs or baselines (N, ...), and their reverse complements where both strands count."""
    if not plan.config.reverse_complement:
        return [columns]
    return [columns, sequences.reverse_complement(columns, plan.preprocess.alphabet)]


def scored(plan: Plan, batch: Batch, places: Sequence[int]) -> list[Scored]:
    """Run some samples of a batch forward, and their other strands where both count. Raises NonFiniteError.

    The target is the same for both strands, by their mean logits.
    """
    model = plan.model
    sent = batch.sent.arrived()
    strands = _strands(plan, sent if places == [*range(len(sent))] else sent[list(places)])
    logits = [model.logits(inputs) for inputs in strands]
    head = model.head(strands[0])
    labels = torch.from_numpy(batch.labels[list(places)].astype(np.int64))
    mean = logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)
    target = targets.resolve(plan.wanted, plan.config.score, mean, head, labels)  # type: ignore[arg-type]
    seeds = [baselines.seed_of(batch.ids[i], plan.config.seed) for i in places]
    target = replace(target, seed=torch.tensor(seeds, device=strands[0].device))
    found = []
    for inputs, each in zip(strands, logits, strict=True):
        score = select(each, target, head).double()
        if not bool(torch.isfinite(score).all()):
            model.scores(inputs, target)  # raises, naming the node
        found.append(Scored(inputs, each, head, target, score))
    return found


def _explain_rows(plan: Plan, batch: Batch, places: Sequence[int]) -> tuple[Columns, Sequence[str]]:
    """Explain some samples of a batch: columns (N, ...) and a note for each."""
    runs = _prepared(plan, batch, places)
    result = _explained(plan, plan.explained, runs)
    if not bool(torch.isfinite(result.values.sum())):
        raise InputError(f"{plan.config.method} made a value that is not finite")
    predictions = [apply_head(run.logits, run.head) for run in runs]
    prediction = predictions[0] if len(runs) == 1 else torch.stack(predictions).mean(0)
    score = torch.stack([run.score for run in runs]).mean(0)
    columns = {
        "attribution": result.values,
        "prediction": prediction.flatten(1) if prediction.dim() > 1 else prediction[:, None],
        "target": targets.classes_of(runs[0].target),
        "score": score,
        **_completeness(plan, result, score, runs),
    }
    for name in EXTRAS:
        if (extra := getattr(result, name)) is not None:
            columns[name] = extra
    notes = result.note or [""] * len(places)
    return {name: value.detach().cpu().numpy() for name, value in columns.items()}, notes


def _prepared(plan: Plan, batch: Batch, places: Sequence[int]) -> list[Scored]:
    """What a method is given for some samples: inputs, or the values of the node of `--at`, and baselines of each."""
    runs, references = scored(plan, batch, places), _references(plan, batch, places)
    turned = zip(*(_strands(plan, reference) for reference in references), strict=True)
    runs = [replace(run, references=list(own)) for run, own in zip(runs, turned, strict=True)] if references else runs
    if plan.at is None:
        return runs
    [run] = runs
    held = replace(run.target, held=plan.model.arguments(run.inputs))
    inside = [plan.model.activation(plan.at, each) for each in (run.inputs, *references)]
    return [replace(run, target=held, inputs=inside[0], references=inside[1:])]


def _references(plan: Plan, batch: Batch, places: Sequence[int]) -> list[torch.Tensor]:
    """The baselines (N, ...) of some samples, one tensor for each of the set; none where the method needs none."""
    if plan.baseline is None:
        return []
    asked = places[:1] if plan.baseline.shared else places
    sets = [plan.baseline(batch.samples[i].raw, batch.ids[i], plan.config.seed) for i in asked]
    made = [plan.tensor([plan.encode(raw) for raw in raws]) for raws in zip(*sets, strict=True)]
    return [reference.expand(len(places), *reference.shape[1:]) for reference in made]


def _explained(plan: Plan, model: Model, runs: Sequence[Scored]) -> Attribution:
    """Explain samples; where both strands count, each strand, and all is the mean of the two."""
    results = [_attribute(plan, model, run) for run in runs]
    return results[0] if len(results) == 1 else sequences.joined(results[0], results[1], plan.preprocess.alphabet)


def _attribute(plan: Plan, model: Model, run: Scored) -> Attribution:
    """Explain with the one baseline, or with each of a set in turn: then all is a mean over the set."""
    method, references = plan.method, run.references
    if "baselines" in method.needs:
        return method.attribute(model, run.inputs, run.target, torch.stack(references, 1))
    if len(references) < 2:
        result = method.attribute(model, run.inputs, run.target, references[0] if references else None)
        return replace(result, hypothetical=_hypothetical(plan, result, *references))
    values, remainder = torch.zeros(1, dtype=torch.float64, device=run.inputs.device), None
    hypothetical = values if plan.hypothetical else None
    notes: list[set[str]] = [set() for _ in run.score]
    for reference in references:
        result = method.attribute(model, run.inputs, run.target, reference)
        values = values + result.values.double() / len(references)
        if (more := _hypothetical(plan, result, reference)) is not None:
            hypothetical = hypothetical + more.double() / len(references)  # type: ignore[operator]
        if result.remainder is not None:
            remainder = (0 if remainder is None else remainder) + result.remainder / len(references)
        for found, note in zip(notes, result.note or (), strict=False):
            found.add(note)
    told = tuple("; ".join(sorted(found - {""})) for found in notes)
    return Attribution(values, remainder=remainder, note=told, hypothetical=hypothetical)


def _hypothetical(plan: Plan, result: Attribution, *references: torch.Tensor) -> torch.Tensor | None:
    """What each letter would contribute, as far as one baseline tells; None for what is no one-hot input."""
    if not plan.hypothetical or result.multipliers is None:
        return None
    return sequences.hypothetical(result.multipliers, references[0])


def rank_correlation(plan: Plan, batch: Batch, columns: Columns) -> float:
    """Spearman's correlation of a batch's attributions with those of float32, a mean over its first good rows."""
    places = [i for i in batch.todo if np.isfinite(columns["attribution"][i]).all()][:COMPARED]
    exact = _explained(plan, plan.explained.in_full(), _prepared(plan, batch, places)).values.cpu().numpy()
    pairs = zip(exact, columns["attribution"][places], strict=True)
    return float(np.mean([spearmanr(one, other, axis=None).statistic for one, other in pairs]))


def _completeness(
    plan: Plan, result: Attribution, score: torch.Tensor, runs: Sequence[Scored]
) -> dict[str, torch.Tensor]:
    """baseline_score, the remainder, and completeness_delta = sum + remainder - (score - baseline_score)."""
    reference = result.baseline_score
    if reference is None and runs[0].references:
        reference = torch.stack([_at_baseline(plan, run, each) for run in runs for each in run.references]).mean(0)
    found: dict[str, torch.Tensor] = {}
    if reference is not None:
        found["baseline_score"] = reference
        if "complete" in plan.method.axioms:
            total = result.values.flatten(1).sum(1, dtype=torch.float64)
            total = total if result.remainder is None else total + result.remainder
            found["completeness_delta"] = total - (score - reference)
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
