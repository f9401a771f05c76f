"""The command line: parse, call a verb, print. The only place for typer and rich; heavy imports stay inside commands.

stdout carries results, progress and messages go to stderr.
"""

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attrcli import __version__
from attrcli.errors import AttrcliWarning, UsageError

if TYPE_CHECKING:
    from attrcli.explain import Plan, Summary

Report = Callable[[str, int, int], None]

app = typer.Typer(
    help="Explain saved models: TorchScript, ONNX and .pt2 files, no source code needed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: attrcli explain model.onnx images/ -m integrated_gradients --out run.h5 --overlays overlays/",
)


def printable(text: str) -> str:
    """Text from outside with control characters escaped, so that a file name cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def complain(kind: str, message: str) -> None:
    """Write one message to stderr."""
    print(f"attrcli: {kind}: {printable(message)}", file=sys.stderr)


def _version(asked: bool) -> None:
    if asked:
        print(f"attrcli {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, AttrcliWarning):
            complain("warning", str(message))
        elif "--debug" in sys.argv:
            complain(category.__name__, str(message))

    warnings.showwarning = show
    warnings.simplefilter("always", AttrcliWarning)


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Write over what is there.")]


@contextmanager
def _progress(quiet: bool) -> Iterator[Report]:
    """A progress bar on stderr with rate and time left; silent when that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    console = Console(stderr=True)
    shown = not quiet and sys.stderr.isatty()  # rich also believes FORCE_COLOR
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def _pairs(items: Sequence[str] | None, flag: str) -> dict[str, str]:
    pairs = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} {item}: write it as {flag} NAME=VALUE")
        pairs[name.strip().replace("-", "_") if flag == "-o" else name] = value
    return pairs


# long: one parameter for each option
@app.command(
    epilog="Example: attrcli explain net.onnx photos/ -m integrated_gradients -o steps=auto --out ig.h5 --overlays ig/"
)
def explain(
    model: Annotated[str | None, typer.Argument(help="TorchScript, ONNX or .pt2 file.", show_default=False)] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Files, directories, globs, @list.txt, or - for names on stdin.", show_default=False),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="See `attrcli methods`.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Run file to write or resume (HDF5).")] = None,
    overlays: Annotated[str | None, typer.Option("--overlays", help="Folder for one picture per input.")] = None,
    panel: Annotated[
        bool | None, typer.Option("--panel", help="Pictures of input, heatmap and overlay with a caption.")
    ] = None,
    scale: Annotated[str | None, typer.Option("--scale", help="Colour scale per image, or one per run.")] = None,
    option: Annotated[list[str] | None, typer.Option("-o", help="Method option NAME=VALUE; repeatable.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="predicted, label, index, name, A-B, C@sum, i,j,k.")
    ] = None,
    score: Annotated[str | None, typer.Option("--score", help="logit, prob, logprob or margin.")] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", "-b", help="black, white, mean, blur, ... or a file.")
    ] = None,
    background: Annotated[
        str | None, typer.Option("--background", help="Table whose column means are the baseline.")
    ] = None,
    preprocess: Annotated[
        str | None, typer.Option("--preprocess", "-p", help="imagenet, unit or a sidecar file.")
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="CSV with columns id,label.")] = None,
    input: Annotated[str | None, typer.Option("--input", help="Input to explain, when there are several.")] = None,
    fix: Annotated[list[str] | None, typer.Option("--fix", help="Other input: NAME=FILE or NAME=zero.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="Output to explain, when there are several.")] = None,
    at: Annotated[str | None, typer.Option("--at", help="Explain at a node of the graph instead of the input.")] = None,
    batch_size: Annotated[str | None, typer.Option("--batch-size", help="auto, or rows per pass.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="float32 or float64.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of all that is drawn, per input.")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="Bit-equal results on a GPU, slower.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N inputs.")] = None,
    max_errors: Annotated[
        str | None, typer.Option("--max-errors", help="Failed inputs that still exit 0: N or P%.")
    ] = None,
    fail_fast: Annotated[bool | None, typer.Option("--fail-fast", help="Stop at the first input that fails.")] = None,
    force: Annotated[bool | None, typer.Option("--force", help="Start over instead of resuming.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
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
        "options": _pairs(option, "-o") or None, "baseline": baseline, "background": background,
        "preprocess": preprocess, "labels": labels, "input": input, "fix": _pairs(fix, "--fix") or None,
        "output": output, "at": at, "batch_size": batch_size, "device": device, "precision": precision,
        "threads": threads, "seed": seed, "deterministic": deterministic, "limit": limit, "force": force,
        "fail_fast": fail_fast, "overlays": overlays, "panel": panel, "scale": scale, "max_errors": max_errors,
    }  # fmt: skip
    from attrcli import config as configs

    resolved = configs.resolve(given, config)
    if print_config:
        print(configs.to_toml(resolved), end="")
        return
    from attrcli import explain as verb

    plan = verb.Plan(resolved)
    if dry_run:
        _print(asdict(plan.estimate()), as_json)
        return
    try:
        with _progress(quiet) as report:
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
    if drawn is not None:
        facts |= {"overlays": drawn, "folder": folder} if as_json else {"overlays": f"{drawn} in {Path(folder)}"}
    _print(facts, as_json)


def _print(facts: Mapping[str, Any], as_json: bool) -> None:
    """Results on stdout: 'name: value' lines, or JSON."""
    if as_json:
        _print_json(facts)
        return
    width = max(len(key) for key in facts) + 1
    for key, value in facts.items():
        if isinstance(value, dict) and key in ("methods", "operations"):
            print(f"{key}:")
            for name, item in value.items():
                print(printable(f"  {name:<24} {item}"))
        elif isinstance(value, list):
            print(f"{key}:")
            for item in value:
                print(printable(f"  {item}"))
        else:
            print(printable(f"{key + ':':<{width}} {_shown(value)}"))


def _print_json(value: Any) -> None:
    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: plain(each) for key, each in item.items()}
        if isinstance(item, list | tuple):
            return [plain(each) for each in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item  # JSON has no NaN

    print(json.dumps(plain(value), default=str, allow_nan=False))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={_shown(item)}" for key, item in value.items())
    return "none" if value is None else str(value)


@app.command(epilog="Example: attrcli methods integrated_gradients")
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods; or one with its paper, cost, needs, axioms and options."""
    from attrcli import methods as registry

    if name is None:
        if as_json:
            _print_json([asdict(registry.description(key)) for key in registry.METHODS])
            return
        for key, (_, summary) in registry.METHODS.items():
            print(f"{key:<22} {summary}")
        return
    described = registry.description(name)
    if as_json:
        _print_json(asdict(described))
        return
    print(f"{described.name}: {described.summary}\n\n{described.text}\n")
    for key in ("paper", "cost"):
        print(f"{key + ':':<8} {getattr(described, key)}")
    print(f"needs:   {', '.join(described.needs) or 'nothing'}")
    print(f"axioms:  {', '.join(described.axioms) or 'none'}")
    for option in described.options:
        print(f"\n-o {option.name}={option.default}   ({option.type})\n   {option.help}")


@app.command(epilog="Example: attrcli inspect model.onnx")
def inspect(
    path: Annotated[Path, typer.Argument(help="A model file or a run file.")],
    shape: Annotated[str | None, typer.Option("--shape", help="Shape of one sample, C,H,W, where unknown.")] = None,
    write_sidecar: Annotated[
        bool, typer.Option("--write-sidecar", help="Write <stem>.toml beside the model, to be checked by hand.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what is in a model file (inputs, operations, which methods work) or in a run file (counts, gaps)."""
    from attrcli import inspect as verb

    sizes = _sizes(shape)
    if write_sidecar:
        print(printable(str(verb.write_sidecar(path, sizes, force=force))))
        return
    run = verb.is_run_file(path)
    facts = verb.run_file(path) if run else verb.model_file(path, sizes)
    if not as_json and "nodes" in facts:
        facts["graph_nodes"] = f"{len(facts.pop('nodes'))} (--json lists their names, for --at)"
    _print(facts, as_json)


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--shape {text}: whole numbers, as in 3,224,224")
    return tuple(int(part) for part in parts)


Root = Annotated[Path | None, typer.Option("--root", help="Folder of the inputs, where they moved since.")]


@app.command(epilog="Example: attrcli render ig.h5 occlusion.h5 --out grid.png")
def render(
    runs: Annotated[list[Path], typer.Argument(help="Run files; several make one picture side by side.")],
    out: Annotated[Path, typer.Option("--out", help="A folder (one picture per row) or a .png (one grid).")],
    panel: Annotated[bool, typer.Option("--panel", help="Input, heatmap and overlay with a caption.")] = False,
    scale: Annotated[str, typer.Option("--scale", help="image or run.")] = "image",
    colormap: Annotated[str, typer.Option("--colormap", help="A diverging colour map of matplotlib.")] = "bwr",
    alpha: Annotated[float, typer.Option("--alpha", help="Opacity of the strongest attribution.")] = 0.85,
    percentile: Annotated[float, typer.Option("--percentile", help="Of |attribution|; the end of the scale.")] = 99.0,
    limit: Annotated[int | None, typer.Option("--limit", help="Rows of a grid (default 12).")] = None,
    root: Root = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw run files: one picture per row, or a grid with inputs as rows and run files as columns."""
    from attrcli import overlays

    style = overlays.style(panel=panel, scale=scale, colormap=colormap, alpha=alpha, percentile=percentile)
    if out.suffix.lower() == ".png":
        count, failed = overlays.grid(runs, out, style, root=root, limit=limit, force=force)
        _print({"grid": str(out), "rows": count, "columns": len(runs)}, False)
        if failed:
            raise typer.Exit(3)
        return
    if len(runs) > 1:
        raise UsageError("several run files make one picture: give --out FILE.png, or render them one by one")
    with _progress(quiet) as report:
        drawn, failed = overlays.draw(runs[0], out, style, root=root, force=force, progress=report)
    _print({"overlays": f"{drawn} in {out}"}, False)
    if failed:
        raise typer.Exit(3)


@app.command(epilog="Example: attrcli export ig.h5 project/ --to virelay")
def export(
    run: Annotated[Path, typer.Argument(help="A run file.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write into.")],
    to: Annotated[str, typer.Option("--to", help="npz or virelay.")],
    root: Root = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a run file in the format of another tool."""
    from attrcli import overlays
    from attrcli.export import export as verb

    images, labels = overlays.model_images(run, root) if to == "virelay" else (None, None)
    for path in verb(run, to, folder, images=images, labels=labels, force=force):
        print(printable(str(path)))
