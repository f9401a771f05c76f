"""The app: its name, its help, its version, and how warnings are shown."""

import sys
import warnings
from typing import Annotated, Any

import typer

from attrcli import __version__
from attrcli.cli._terminal import complain
from attrcli.errors import AttrcliWarning

app = typer.Typer(
    help="Explain saved models: TorchScript, ONNX and .pt2 files, no source code needed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: attrcli explain model.onnx images/ -m integrated_gradients --out run.h5 --overlays overlays/",
)


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
