"""attrcli export."""

from pathlib import Path
from typing import Annotated

import typer

from attrcli.cli._app import app
from attrcli.cli._options import Debug, Force, Root
from attrcli.cli._terminal import printable


@app.command(epilog="Example: attrcli export ig.h5 project/ --to virelay")
def export(
    run: Annotated[Path, typer.Argument(help="A run file.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write into.")],
    to: Annotated[str, typer.Option("--to", help="npz, virelay or modisco.")],
    root: Root = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a run file in the format of another tool."""
    from attrcli import overlays
    from attrcli.export import export as verb

    images, labels = overlays.model_images(run, root) if to == "virelay" else (None, None)
    sequences = overlays.model_sequences(run, root) if to == "modisco" else None
    for path in verb(run, to, folder, images=images, sequences=sequences, labels=labels, force=force):
        print(printable(str(path)))
