"""attrcli prune."""

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attrcli.cli._app import app
from attrcli.cli._options import (
    BatchSize,
    Debug,
    Device,
    Fix,
    Force,
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
from attrcli.cli._terminal import complain, print_facts, printable, progress

if TYPE_CHECKING:
    from attrcli.prune import Summary


# long: one parameter for each option
@app.command(epilog="Example: attrcli prune net.onnx photos/ --sparsity 0.9 --out pruned/ --export union")
def prune(
    model: ModelFile = None,
    inputs: Inputs = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder to write into: masks.h5, jaccard.png.")] = None,
    criterion: Annotated[
        str, typer.Option("--criterion", help="prune_grad, prune_int, greedy or random.")
    ] = "prune_grad",
    sparsity: Annotated[float | None, typer.Option("--sparsity", help="Share of neurons to prune; 0.9.")] = None,
    max_output_change: Annotated[
        float | None, typer.Option("--max-output-change", help="Prune as far as the prediction changes by no more.")
    ] = None,
    ops: Annotated[
        str | None, typer.Option("--ops", help="Whose outputs are neurons, as in relu,gelu; by default relu.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", help="Option NAME=VALUE of the criterion, as steps=50 of prune_int.")
    ] = None,
    export: Annotated[
        str | None, typer.Option("--export", help="Write masked models: each, union or intersection.")
    ] = None,
    target: TargetOf = None,
    preprocess: PreprocessBy = None,
    labels: Labels = None,
    input: InputName = None,
    fix: Fix = None,
    output: OutputName = None,
    batch_size: BatchSize = None,
    device: Device = None,
    precision: Precision = None,
    threads: Threads = None,
    seed: Seed = None,
    limit: Limit = None,
    force: Force = False,
    trust_model: Trust = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the neurons that each input's prediction rests on; write them as masks, and as smaller models."""
    given = {
        "model": model, "inputs": inputs, "out": out, "method": "prune_grad", "target": target,
        "preprocess": preprocess, "labels": labels, "input": input, "fix": pairs(fix, "--fix") or None,
        "output": output, "batch_size": batch_size, "device": device, "precision": precision, "threads": threads,
        "seed": seed, "limit": limit, "force": force, "trust_model": trust_model,
    }  # fmt: skip
    from attrcli import config as configs

    resolved = configs.resolve(given, None)
    from attrcli import prune as verb

    wanted = verb.Wanted(criterion, sparsity, max_output_change, ops, export, pairs(option, "-o"))
    plan = verb.plan(wanted, **{each.name: getattr(resolved, each.name) for each in fields(resolved)})
    try:
        with progress(quiet) as report:
            summary = verb.prune(plan, wanted, report)
    except KeyboardInterrupt:
        complain("error", f"interrupted; nothing is kept in {out}; the same command starts anew")
        raise typer.Exit(130) from None
    _report(summary, as_json)
    if summary.errors:
        raise typer.Exit(3)


def _report(summary: "Summary", as_json: bool) -> None:
    for _, message in summary.errors[:20]:
        complain("failed", message)
    facts: dict[str, Any] = {
        "folder": str(summary.folder),
        "rows": summary.rows,
        "ok": summary.rows - len(summary.errors),
        "errors": len(summary.errors),
        "neurons": summary.neurons,
        "sparsity": round(summary.sparsity, 4),
        "change": float(f"{summary.change:.3g}"),
        "change_of": summary.measured_on,
        "same_class": round(summary.agreement, 4),
        "kept": {name: round(share, 4) for name, share in summary.kept.items()},
    }
    if summary.exports:
        (whole, small), (before, after) = summary.bytes, summary.seconds
        facts |= {
            "models": len(summary.exports),
            "model": str(summary.exports[0]),
            "parameters": round(summary.parameters[1] / summary.parameters[0], 4),
            "bytes": round(small / whole, 4),
            "time": round(after / before, 3),
        }
    compared = summary.compared > 1
    if as_json:
        table = {"jaccard": {"classes": summary.classes, "mean": summary.jaccard}} if compared else {}
        print_facts(facts | table, True)
        return
    print_facts(facts, False)
    if compared:
        _table(summary)


def _table(summary: "Summary") -> None:
    """The mean Jaccard of kept neurons by class; a class of one input has none with itself."""
    names = [printable(name)[:12] for name in summary.classes]
    width = max(len(name) for name in names)
    print(f"jaccard, mean over pairs of {summary.compared} inputs:")
    print(" ".join([" " * width, *(f"{number:>5}" for number in range(1, len(names) + 1))]))
    for name, row in zip(names, summary.jaccard, strict=True):
        print(" ".join([f"{name:<{width}}", *("    -" if value != value else f"{value:5.2f}" for value in row)]))
