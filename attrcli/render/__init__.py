"""Pictures of attributions for people: overlays, panels, grids and bar charts as PNG files."""

from attrcli.render.chart import bar_chart
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
    "bar_chart",
    "cell",
    "describe",
    "heatmap",
    "matrix",
    "montage",
    "overlay",
    "panel",
    "reduce_channels",
    "robust_scale",
    "run_scale",
    "save_png",
    "shrink",
    "thumbnail",
]
