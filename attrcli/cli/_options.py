"""Options that several commands share, and how their text is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from attrcli.errors import UsageError

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Write over what is there.")]
Trust = Annotated[
    bool | None, typer.Option("--trust-model", help="Load TorchScript that runs code of its own while it is loaded.")
]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of the inputs, where they moved since.")]

ModelFile = Annotated[str | None, typer.Argument(help="TorchScript, ONNX or .pt2 file.", show_default=False)]
Inputs = Annotated[
    list[str] | None,
    typer.Argument(help="Files, directories, globs, @list.txt, or - for names on stdin.", show_default=False),
]
TargetOf = Annotated[
    str | None, typer.Option("--target", "-t", help="predicted, label, index, name, A-B, C@sum, i,j,k.")
]
PreprocessBy = Annotated[str | None, typer.Option("--preprocess", "-p", help="imagenet, unit or a sidecar file.")]
Labels = Annotated[str | None, typer.Option("--labels", help="CSV with columns id,label.")]
InputName = Annotated[str | None, typer.Option("--input", help="Input to explain, when there are several.")]
Fix = Annotated[list[str] | None, typer.Option("--fix", help="Other input: NAME=FILE or NAME=zero.")]
OutputName = Annotated[str | None, typer.Option("--output", help="Output to explain, when there are several.")]
BatchSize = Annotated[str | None, typer.Option("--batch-size", help="auto, or rows per pass.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
Precision = Annotated[str | None, typer.Option("--precision", help="float32, float64 or bf16 (coarse).")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of all that is drawn, per input.")]
Deterministic = Annotated[bool | None, typer.Option("--deterministic", help="Bit-equal results on a GPU, slower.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first N inputs.")]


def pairs(items: Sequence[str] | None, flag: str) -> dict[str, str]:
    """The NAME=VALUE items of a repeatable flag. Raises UsageError for anything else."""
    pairs = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} {item}: write it as {flag} NAME=VALUE")
        pairs[name.strip().replace("-", "_") if flag == "-o" else name] = value
    return pairs
