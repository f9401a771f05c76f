"""inspect --complete: whether DeepLIFT's sum is right on a model and an input, and at which node it is not."""

from pathlib import Path
from typing import Any

import torch

from attrcli import targets
from attrcli.config import Config
from attrcli.errors import InputError, UsageError
from attrcli.graph.completeness import Walk, walk
from attrcli.methods._method import Ruling
from attrcli.plan import Plan
from attrcli.score import select

COMPLETE = 1e-9
"""What a node may miss of the contributions that it shares out, in float64."""


def completeness(
    path: Path,
    given: str,
    *,
    baseline: str | None = None,
    preprocess: str | None = None,
    target: str = "predicted",
    trusted: bool = False,
) -> dict[str, Any]:
    """Walk from the output to one input under DeepLIFT's rules, in float64, and say where the sum stops matching.

    Raises UnsupportedOp for an op without a rule, InputError for an input that cannot be read.
    """
    told: dict[str, Any] = {
        "baseline": baseline, "preprocess": preprocess, "target": target, "trust_model": trusted
    }  # fmt: skip
    plan = Plan(Config(str(path), (given,), "deeplift", f"{path}.h5", precision="float64", limit=1, force=True, **told))
    sample, record = plan.read(plan.records[0]), plan.records[0]
    if sample.message:
        raise InputError(sample.message)
    if (batch := plan.model.engine(plan.shape).batch) not in (None, 1):
        raise UsageError(f"{path}: its batch is frozen at {batch}; --complete walks with one input")
    assert plan.baseline is not None
    assert isinstance(plan.method, Ruling)
    inputs = plan.tensor([sample.x])
    reference = plan.tensor([plan.encode(plan.baseline(sample.raw, record.id, plan.config.seed)[0])])
    logits, head = plan.model.logits(inputs).requires_grad_(True), plan.model.head(inputs)
    chosen = targets.resolve(plan.wanted, "logit", logits.detach(), head, torch.from_numpy(plan.labels[:1].astype(int)))
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(select(logits, chosen, head).sum(), logits)
    here, there = ([*plan.model.arguments(each).values()] for each in (inputs, reference))
    walked = walk(plan.method.ruled(plan.model, inputs), here, there, gradient)
    return _walked(str(path), record.id, walked)


def _walked(path: str, name: str, walked: Walk) -> dict[str, Any]:
    """The facts of a walk: where the sum first stops matching, and the nodes that miss most."""
    missed = walked.total + walked.remainder - walked.delta
    broken = [gap for gap in walked.gaps if gap.relative > COMPLETE]
    worst = sorted(walked.gaps, key=lambda gap: -gap.relative)[:5]
    facts: dict[str, Any] = {"model": path, "input": name, "delta": walked.delta, "sum": walked.total}
    facts |= {"remainder": walked.remainder, "gap": missed, "nodes": len(walked.gaps), "complete": not broken}
    if broken:
        facts |= {"first": broken[0].node, "first_op": broken[0].op, "first_origin": broken[0].origin}
        facts |= {"first_gap": broken[0].gap, "first_share": broken[0].gap / missed if missed else None}
    largest = worst[0].relative if worst else 0.0
    facts["largest"] = largest
    facts["worst"] = [f"{gap.node} ({gap.op}): {gap.gap:.2g}, {gap.relative:.1g} of what it shares" for gap in worst]
    return facts
