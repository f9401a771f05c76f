"""attrcli render."""

from pathlib import Path
from typing import Annotated

import typer

from attrcli.cli._app import app
from attrcli.cli._options import Debug, Force, Quiet, Root
from attrcli.cli._terminal import print_facts, progress
from attrcli.errors import UsageError


@app.command(epilog="Example: attrcli render ig.h5 occlusion.h5 --out grid.png")
def render(
    runs: Annotated[list[Path], typer.Argument(help="Run files; several make one picture side by side.")],
    out: Annotated[Path, typer.Option("--out", help="A folder (one picture per row) or a .png (one grid).")],
    panel: Annotated[bool, typer.Option("--panel", help="Input, heatmap and overlay with a caption.")] = False,
    scale: Annotated[str, typer.Option("--scale", help="image or run.")] = "image",
    colormap: Annotated[str, typer.Option("--colormap", help="A diverging colour map of matplotlib.")] = "bwr",
    alpha: Annotated[float, typer.Option("--alpha", help="Opacity of the strongest attribution.")] = 0.85,
    percentile: Annotated[float, typer.Option("--percentile", help="Of |attribution|; the end of the scale.")] = 99.0,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N inputs (a grid: 12).")] = None,
    root: Root = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw run files: one picture per row, or a grid with inputs as rows and run files as columns."""
    from attrcli import overlays

    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: a whole number of at least 1")
    style = overlays.style(panel=panel, scale=scale, colormap=colormap, alpha=alpha, percentile=percentile)
    if out.suffix.lower() == ".png":
        count, failed = overlays.grid(runs, out, style, root=root, limit=limit, force=force)
        print_facts({"grid": str(out), "rows": count, "columns": len(runs)}, False)
        if failed:
            raise typer.Exit(3)
        return
    if len(runs) > 1:
        raise UsageError("several run files make one picture: give --out FILE.png, or render them one by one")
    with progress(quiet) as report:
        drawn, failed = overlays.draw(runs[0], out, style, root=root, limit=limit, force=force, progress=report)
    print_facts({"overlays": f"{drawn} in {out}"}, False)
    if failed:
        raise typer.Exit(3)
