"""Baselines: the input x' that stands for absence.

A baseline lives in raw input space (as ``preprocess`` defines it: pixels 0..255 at the model's size, values before mean
and std) and is then preprocessed like the input itself: black is pixel 0, not 0 after mean and std.

A sequence is columns (A, L) there; padding, columns of zeros at either end, is as absent as can be and stays.

Source: Sturmfels, Lundberg & Lee 2020, 'Visualizing the Impact of Feature Attribution Baselines' (constant, blurred,
uniform); Kapishnikov et al. 2019 (black and white); Fong & Vedaldi 2017 (blur).
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from attrcli import letters
from attrcli.errors import InputError, UsageError

MOST = 1000
"""Most baselines of a set: each costs as much as one alone."""

Array = npt.NDArray[Any]
Stored = tuple[str, Array]
"""Id and raw values of an input that was read from a file."""
Fill = Callable[[Array, np.random.Generator], Array]

SHUFFLE, SHUFFLES = "shuffle", 20
"""The baseline of shuffles, and how many where that is not said."""

FREQUENCIES = {"A": 0.3, "C": 0.2, "G": 0.2, "T": 0.3}
"""Letters of DNA as they occur; in other alphabets all alike."""

BLUR_SIGMA = 0.05  # of the shorter side: 11 pixels at 224, where Fong & Vedaldi 2017 take 10


def black(raw: Array, generator: np.random.Generator) -> Array:
    """Every pixel 0."""
    return np.zeros_like(raw)


def white(raw: Array, generator: np.random.Generator) -> Array:
    """Every pixel 255."""
    return np.full_like(raw, 255)


def grey(raw: Array, generator: np.random.Generator) -> Array:
    """Every pixel 127.5, the middle of the range."""
    return np.full_like(raw, 127.5)


def mean(raw: Array, generator: np.random.Generator) -> Array:
    """The image's own mean colour, everywhere."""
    return np.broadcast_to(raw.mean(axis=(0, 1), dtype=np.float64), raw.shape).astype(raw.dtype)


def blur(raw: Array, generator: np.random.Generator) -> Array:
    """The image under a Gaussian of sigma = 0.05 of the shorter side; edge pixels continue outside.

    Source: Fong & Vedaldi 2017, section 3.1; Sturmfels 2020.
    """
    sigma = BLUR_SIGMA * min(raw.shape[:2])
    blurred: Array = gaussian_filter(raw, sigma=(sigma, sigma, 0), mode="nearest")
    return blurred


def noise(raw: Array, generator: np.random.Generator) -> Array:
    """Every pixel and channel drawn uniformly from 0..255, by sample id and seed.

    Source: Sturmfels 2020 ('uniform').
    """
    return generator.uniform(0, 255, raw.shape).astype(raw.dtype)


def zero(raw: Array, generator: np.random.Generator) -> Array:
    """Every value 0."""
    return np.zeros_like(raw)


def shuffle(raw: Array, generator: np.random.Generator) -> Array:
    """The sequence, shuffled so that every pair of neighbours occurs as often as before, and with the same two ends.

    A walk over an Euler path: each letter's successors are shuffled, but for the last, and used up in that order.
    What is no letter of the alphabet counts as a further letter; padding stays.

    Source: Altschul & Erickson 1985; Shrikumar et al. 2017 (genomics notebook of deeplift).
    """
    found = letters.inside(raw)
    part = np.ascontiguousarray(raw[:, found].T)
    names = part.view(f"V{part.shape[1] * part.itemsize}").ravel().tolist()
    after: dict[bytes, list[int]] = {}
    for place, name in enumerate(names[:-1]):
        after.setdefault(name, []).append(place + 1)
    for places in after.values():
        places[:-1] = generator.permutation(np.array(places[:-1], dtype=np.intp)).tolist()
    steps = {name: iter(places) for name, places in after.items()}
    path = [0] if names else []
    for _ in names[1:]:
        path.append(next(steps[names[path[-1]]]))
    shuffled = raw.copy()
    shuffled[:, found] = part[path].T
    return shuffled


def frequencies(alphabet: str) -> Fill:
    """The frequencies of the letters at every position but padding: `FREQUENCIES` for DNA, else all alike."""
    common = 1 / len(alphabet)
    column = [FREQUENCIES[letter] if letters.is_dna(alphabet) else common for letter in alphabet]

    def fill(raw: Array, generator: np.random.Generator) -> Array:
        filled = raw.copy()
        filled[:, letters.inside(raw)] = np.array(column)[:, None]
        return filled

    return fill


class Recipe(NamedTuple):
    """A named baseline: ``shared`` if it depends on nothing but the shape of the input."""

    fill: Fill
    kinds: tuple[str, ...]
    shared: bool


BASELINES: dict[str, Recipe] = {
    "black": Recipe(black, ("image",), True),
    "white": Recipe(white, ("image",), True),
    "grey": Recipe(grey, ("image",), True),
    "mean": Recipe(mean, ("image",), False),
    "blur": Recipe(blur, ("image",), False),
    "noise": Recipe(noise, ("image",), False),
    "zero": Recipe(zero, ("array", "table", "sequence"), True),
}
DEFAULTS = {"image": "black", "table": "mean", "array": "zero", "sequence": SHUFFLE}


@dataclass(frozen=True)
class Baseline:
    """A baseline for any sample, or a set of them, one for each of ``fills``; attributions are means over the set.

    ``shared`` if equal for all samples of one shape; ``file`` is the file or directory that it was read from.
    """

    name: str
    shared: bool
    fills: tuple[Fill, ...]
    file: Path | None = None

    def __call__(self, raw: Array, sample_id: str, seed: int) -> list[Array]:
        """x' for one raw input, of its shape, all of the set; what is random depends on sample id and seed alone.

        Raises: InputError if the baseline was read from a file and has another shape.
        """
        generator = np.random.default_rng(seed_of(sample_id, seed))
        return [fill(raw, generator) for fill in self.fills]


def seed_of(sample_id: str, seed: int) -> int:
    """The seed, 63 bits, of all that is drawn for one sample: it depends on its id and on `--seed` alone."""
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) >> 1


def resolve(
    spec: str | None,
    kind: str,
    *,
    load: Callable[[Path], Iterable[Stored]],
    background: Path | None = None,
    alphabet: str = "",
    several: bool = False,
) -> Baseline:
    """The baseline for ``--baseline``: a name, the inputs of a file or directory, or the default of the kind (None).

    ``load`` gives the inputs of a file or directory. ``mean`` of a table is the column means of ``background``; the
    background of a sequence is that of its ``alphabet``. ``shuffle:K`` is a set of K shuffles, drawn one after another.
    With ``several`` it must be a set of at least 2.

    Raises: UsageError for an unknown name, a file or directory without inputs or with too many, and a background that
    is missing or not used.
    """
    name = DEFAULTS[kind] if spec is None else spec
    fewest = 2 if several else 1
    count = _shuffles(name, fewest) if kind == "sequence" else None
    if several and count is None and not Path(name).exists():
        raise UsageError(
            f"--baseline {name}{'' if spec else ' (the default)'}: the method takes a mean over a set of at least 2 "
            f"baselines; accepted: {f'{SHUFFLE}:K, ' if kind == 'sequence' else ''}a directory, or a file of several "
            "inputs"
        )
    if kind == "table" and name == "mean":
        if background is None:
            default = "the default baseline of a table" if spec is None else "--baseline mean"
            raise UsageError(
                f"{default} is the column means of a background: give --background FILE, or --baseline zero"
            )
        return Baseline("mean", True, (_constant(column_means(background, load), str(background)),), background)
    if background is not None:
        raise UsageError(f"--background {background}: only --baseline mean of a table uses one; leave it out")
    if kind == "sequence" and name == "background":
        return Baseline(name, False, (frequencies(alphabet),))
    if count is not None:
        return Baseline(SHUFFLE, False, (shuffle,) * count)
    recipe = BASELINES.get(name)
    if recipe is not None and kind in recipe.kinds:
        return Baseline(name, recipe.shared, (recipe.fill,))
    if not Path(name).exists():
        raise _unknown(name, kind)
    return _of_file(name, list(islice(load(Path(name)), MOST + 1)), fewest)


def _unknown(name: str, kind: str) -> UsageError:
    own = {DEFAULTS[kind]} | ({"background", f"{SHUFFLE}:K"} if kind == "sequence" else set())
    accepted = sorted({key for key, each in BASELINES.items() if kind in each.kinds} | own)
    close = difflib.get_close_matches(name, accepted, n=1)
    near = f" (did you mean {close[0]!r}?)" if close else ""
    return UsageError(
        f"--baseline {name}: neither a file nor a baseline for kind {kind}{near}; accepted: {', '.join(accepted)}, "
        "a file or a directory"
    )


def _of_file(name: str, found: Sequence[Stored], fewest: int) -> Baseline:
    """The baseline that a file or directory holds. Raises UsageError for too few or too many."""
    if not fewest <= len(found) <= MOST:
        held = f"more than {MOST} inputs" if len(found) > MOST else "one input" if found else "no input"
        raise UsageError(
            f"--baseline {name}: holds {held}; accepted: {fewest} to {MOST}, over which attributions are means"
        )
    sources = [name] if len(found) == 1 else [f"{name}: {each}" for each, _ in found]
    fills = (_constant(values, source) for source, (_, values) in zip(sources, found, strict=True))
    return Baseline("file", True, tuple(fills), Path(name))


def _shuffles(name: str, fewest: int) -> int | None:
    """How many shuffles `shuffle` or `shuffle:K` asks for; None for another name. Raises UsageError for another K."""
    if name == SHUFFLE:
        return SHUFFLES
    if not name.startswith(f"{SHUFFLE}:"):
        return None
    count = name.removeprefix(f"{SHUFFLE}:")
    if re.fullmatch("[1-9][0-9]{0,3}", count) is None or not fewest <= int(count) <= MOST:
        raise UsageError(f"--baseline {name}: accepted: shuffle:K, with K from {fewest} to {MOST}")
    return int(count)


def column_means(path: Path, load: Callable[[Path], Iterable[Stored]]) -> Array:
    """Mean of each column over all rows of a file, (F,), in one pass.

    Raises: UsageError if there are no rows.
    """
    total, count = np.zeros(()), 0
    for _, row in load(path):
        total, count = total + row.astype(np.float64), count + 1
    if count == 0:
        raise UsageError(f"--background {path}: the file holds no rows")
    return np.asarray(total / count)


def _constant(values: Array, source: str) -> Fill:
    def fill(raw: Array, generator: np.random.Generator) -> Array:
        if values.shape != raw.shape:
            raise InputError(f"the baseline {source!r} has the shape {values.shape}, the input {raw.shape}")
        return values.astype(raw.dtype if raw.dtype.kind == "f" else values.dtype)

    return fill
