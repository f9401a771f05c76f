"""Pictures of sequences from the rows of a run file: what `overlays` draws in place of an image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from attrcli import letters, render
from attrcli.preprocess import Preprocess

Array = npt.NDArray[Any]


def contributions(values: Array) -> Array:
    """What each position contributes, (L,): the sum over the letters, of which the absent ones carry a part."""
    total: Array = values.sum(axis=0, dtype=np.result_type(values.dtype, np.float32))
    return total


def track(p: Preprocess, stored: Array, values: Array, name: str = "contribution") -> render.Track:
    """Contributions (A, L) or (1, L) as letters: those of the sequence as it was stored, N or X for others."""
    alphabet = p.alphabet + letters.stand_in(p.alphabet)
    text, total = letters.text_of(p.fit(stored), p.alphabet), contributions(values)
    heights = np.zeros((len(alphabet), len(total)), total.dtype)
    heights[[alphabet.index(letter) for letter in text], np.arange(len(total))] = total
    return render.Track(name, heights, alphabet)


def picture(
    p: Preprocess,
    stored: Array,
    values: Array,
    hypothetical: Array | None,
    caption: Sequence[str],
    scale: float | None,
) -> Image.Image:
    """The logo of one row; with what every letter would contribute below it where that is given."""
    tracks = [track(p, stored, values)]
    if hypothetical is not None:
        tracks.append(render.Track("hypothetical", hypothetical, p.alphabet))
    return render.logo(tracks, caption, scale, render.shown(contributions(values)))


def written(p: Preprocess, stored: Array, values: Array) -> Image.Image:
    """The sequence itself, for a grid: its letters at the positions that `cell` shows, all of one height."""
    within = render.cell_positions(contributions(values))
    own = track(p, stored, np.ones((1, values.shape[-1])))
    return render.logo_cell(own, 1.0, within)


def cell(p: Preprocess, stored: Array, values: Array, scale: float, within: Array) -> Image.Image:
    """The logo of one row in a grid, at the positions where the contributions of the row `within` are largest."""
    return render.logo_cell(track(p, stored, values), scale, render.cell_positions(contributions(within)))
