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


def pairs(items: Sequence[str] | None, flag: str) -> dict[str, str]:
    """The NAME=VALUE items of a repeatable flag. Raises UsageError for anything else."""
    pairs = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} {item}: write it as {flag} NAME=VALUE")
        pairs[name.strip().replace("-", "_") if flag == "-o" else name] = value
    return pairs
