"""attrcli inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer

from attrcli.cli._app import app
from attrcli.cli._options import Debug, Force, Json, PreprocessBy, Trust
from attrcli.cli._terminal import print_facts, printable
from attrcli.errors import UsageError


@app.command(epilog="Example: attrcli inspect model.onnx")
def inspect(
    path: Annotated[Path, typer.Argument(help="A model file or a run file.")],
    shape: Annotated[str | None, typer.Option("--shape", help="Shape of one sample, C,H,W, where unknown.")] = None,
    write_sidecar: Annotated[
        bool, typer.Option("--write-sidecar", help="Write <stem>.toml beside the model, to be checked by hand.")
    ] = False,
    complete: Annotated[
        str | None, typer.Option("--complete", help="An input: say at which node DeepLIFT's sum stops matching.")
    ] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", "-b", help="As for explain, with --complete.")] = None,
    preprocess: PreprocessBy = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="As for explain, with --complete; predicted.")
    ] = None,
    trust_model: Trust = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what is in a model file (inputs, operations, which methods work) or in a run file (counts, gaps)."""
    from attrcli import inspect as verb

    sizes = _sizes(shape)
    for option, value in (("--baseline", baseline), ("--target", target)):
        if value is not None and complete is None:
            raise UsageError(f"{option} {value}: it matters to --complete INPUT alone; leave it out")
    if write_sidecar:
        print(printable(str(verb.write_sidecar(path, sizes, force=force, trusted=bool(trust_model)))))
        return
    if complete is not None:
        from attrcli.complete import completeness

        asked = {"baseline": baseline, "preprocess": preprocess, "target": target or "predicted"}
        print_facts(completeness(path, complete, **asked, trusted=bool(trust_model)), as_json)  # type: ignore[arg-type]
        return
    run = verb.is_run_file(path)
    told = {"preprocess": preprocess, "trusted": bool(trust_model)}
    facts = verb.run_file(path) if run else verb.model_file(path, sizes, **told)  # type: ignore[arg-type]
    if not as_json and "nodes" in facts:
        facts["graph_nodes"] = f"{len(facts.pop('nodes'))} (--json lists their names, for --at)"
    print_facts(facts if as_json else _told_once(facts), as_json)


def _told_once(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with what keeps several methods from working in the note alone."""
    note = facts.get("note")
    if note is None or "methods" not in facts:
        return facts
    short = {f"{word}: {note}": f"{word}: see the note" for word in ("no", "not known")}
    told = {name: short.get(text, text) for name, text in facts["methods"].items()}
    alike = set(told.values())
    return {**facts, "methods": told if len(alike) > 1 else f"{alike.pop()}, for all {len(told)}"}


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.replace("x", ",").split(",")]
    sizes = tuple(int(part) if part.isdecimal() and len(part) < 20 else 0 for part in parts)
    if 0 in sizes:
        raise UsageError(f"--shape {text}: whole numbers, as in 3,224,224")
    return sizes
