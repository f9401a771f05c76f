"""attrcli explain."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attrcli.cli._app import app
from attrcli.cli._options import (
    BatchSize,
    Debug,
    Deterministic,
    Device,
    Fix,
    InputName,
    Inputs,
    Json,
    Labels,
    Limit,
    ModelFile,
    OutputName,
    Precision,
    PreprocessBy,
    Quiet,
    Seed,
    TargetOf,
    Threads,
    Trust,
    pairs,
)
from attrcli.cli._terminal import Report, complain, print_facts, progress

if TYPE_CHECKING:
    from attrcli.explain import Plan, Summary


# long: one parameter for each option
@app.command(
    epilog="Example: attrcli explain net.onnx photos/ -m integrated_gradients -o steps=auto --out ig.h5 --overlays ig/"
)
def explain(
    model: ModelFile = None,
    inputs: Inputs = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="See `attrcli methods`.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Run file to write or resume (HDF5).")] = None,
    overlays: Annotated[str | None, typer.Option("--overlays", help="Folder for one picture per input.")] = None,
    panel: Annotated[
        bool | None, typer.Option("--panel", help="Pictures of input, heatmap and overlay with a caption.")
    ] = None,
    scale: Annotated[str | None, typer.Option("--scale", help="Colour scale per image, or one per run.")] = None,
    option: Annotated[list[str] | None, typer.Option("-o", help="Method option NAME=VALUE; repeatable.")] = None,
    target: TargetOf = None,
    score: Annotated[str | None, typer.Option("--score", help="logit, centred, prob, logprob or margin.")] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", "-b", help="black, mean, blur, shuffle:K, ... or a file.")
    ] = None,
    background: Annotated[
        str | None, typer.Option("--background", help="Table whose column means are the baseline.")
    ] = None,
    preprocess: PreprocessBy = None,
    labels: Labels = None,
    length: Annotated[int | None, typer.Option("--length", help="Crop or pad sequences to it, in the middle.")] = None,
    reverse_complement: Annotated[
        bool | None, typer.Option("--reverse-complement", help="Explain the mean of both strands of DNA or RNA.")
    ] = None,
    input: InputName = None,
    fix: Fix = None,
    output: OutputName = None,
    at: Annotated[str | None, typer.Option("--at", help="Explain at a node of the graph instead of the input.")] = None,
    batch_size: BatchSize = None,
    device: Device = None,
    precision: Precision = None,
    threads: Threads = None,
    seed: Seed = None,
    deterministic: Deterministic = None,
    limit: Limit = None,
    max_errors: Annotated[
        str | None, typer.Option("--max-errors", help="Failed inputs that still exit 0: N or P%.")
    ] = None,
    fail_fast: Annotated[bool | None, typer.Option("--fail-fast", help="Stop at the first input that fails.")] = None,
    force: Annotated[bool | None, typer.Option("--force", help="Start over instead of resuming.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    trust_model: Trust = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with these options.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved options as TOML, and stop.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Explain a saved model on inputs: write attributions to a run file, and pictures beside it."""
    given = {
        "model": model, "inputs": inputs, "method": method, "out": out, "target": target, "score": score,
        "options": pairs(option, "-o") or None, "baseline": baseline, "background": background,
        "preprocess": preprocess, "labels": labels, "input": input, "fix": pairs(fix, "--fix") or None,
        "output": output, "at": at, "batch_size": batch_size, "device": device, "precision": precision,
        "threads": threads, "seed": seed, "deterministic": deterministic, "limit": limit, "force": force,
        "fail_fast": fail_fast, "overlays": overlays, "panel": panel, "scale": scale, "max_errors": max_errors,
        "trust_model": trust_model, "length": length, "reverse_complement": reverse_complement,
    }  # fmt: skip
    from attrcli import config as configs

    resolved = configs.resolve(given, config)
    if print_config:
        print(configs.to_toml(resolved), end="")
        return
    from attrcli import explain as verb

    plan = verb.plan(resolved)
    if dry_run:
        print_facts(asdict(plan.estimate()), as_json)
        return
    try:
        with progress(quiet) as report:
            summary, drawn, missed = _explain(plan, report)
    except KeyboardInterrupt:
        part = Path(f"{resolved.out}.part")
        kept = f"finished rows are in {part}; " if part.exists() else ""
        complain("error", f"interrupted; {kept}the same command goes on from there")
        raise typer.Exit(130) from None
    _report(summary, drawn, resolved.overlays or "", as_json)
    if missed or len(summary.errors) > resolved.tolerated(summary.rows):
        raise typer.Exit(3)


def _explain(plan: "Plan", report: Report) -> "tuple[Summary, int | None, int]":
    """Explain, then draw; also returns how many pictures were drawn, and how many could not be."""
    from attrcli import explain as verb

    config = plan.config
    if config.overlays is None:
        return verb.explain(plan, report), None, 0
    from attrcli import overlays

    folder, style = Path(config.overlays), overlays.style(panel=config.panel, scale=config.scale)
    overlays.prepare(folder, [record.id for record in plan.records], config.method, force=config.force)
    summary = verb.explain(plan, report)
    drawn, missed = overlays.draw(summary.out, folder, style, force=config.force, progress=report)
    return summary, drawn, len(missed)


def _report(summary: "Summary", drawn: int | None, folder: str, as_json: bool) -> None:
    for _, message in summary.errors[:20]:
        complain("failed", message)
    if len(summary.errors) > 20:
        complain("failed", f"... and {len(summary.errors) - 20} more; see /message in {summary.out}")
    facts: dict[str, Any] = {
        "run_file": str(summary.out),
        "rows": summary.rows,
        "ok": summary.ok,
        "errors": len(summary.errors),
        "computed": summary.computed,
        "kept": summary.resumed,
    }
    if summary.added or summary.removed:
        facts.update(inputs_added=summary.added, inputs_removed=summary.removed)
    if summary.accuracy:
        right, labelled = summary.accuracy
        facts |= (
            {"accuracy": right / labelled, "labelled": labelled} if as_json else {"accuracy": f"{right}/{labelled}"}
        )
    if summary.gaps:
        ordered = sorted(summary.gaps)
        facts["gap_median"] = float(f"{ordered[len(ordered) // 2]:.2g}")
        facts["gap_max"] = float(f"{ordered[-1]:.2g}")
    if summary.rank_correlation is not None:
        facts["rank_correlation"] = round(summary.rank_correlation, 4)
    if drawn is not None:
        facts |= {"overlays": drawn, "folder": folder} if as_json else {"overlays": f"{drawn} in {Path(folder)}"}
    print_facts(facts, as_json)
