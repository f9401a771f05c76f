"""Pictures of attributions for people: overlays, panels, grids, bar charts and logos as PNG files."""

from attrcli.render.chart import bar_chart
from attrcli.render.logo import Track, cell_positions, logo, logo_cell, shown
from attrcli.render.matrix import matrix
from attrcli.render.montage import cell, montage, panel, thumbnail
from attrcli.render.overlay import (
    DIVERGING,
    ZERO_NOTE,
    Style,
    describe,
    heatmap,
    overlay,
    reduce_channels,
    robust_scale,
    run_scale,
    save_png,
    shrink,
)

__all__ = [
    "DIVERGING",
    "ZERO_NOTE",
    "Style",
    "Track",
    "bar_chart",
    "cell",
    "cell_positions",
    "describe",
    "heatmap",
    "logo",
    "logo_cell",
    "matrix",
    "montage",
    "overlay",
    "panel",
    "reduce_channels",
    "robust_scale",
    "run_scale",
    "save_png",
    "shown",
    "shrink",
    "thumbnail",
]
