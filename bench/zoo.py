"""The survey of architectures and formats: python bench/zoo.py [--markdown FILE] [--dtype float32] [NAME...]

Every architecture of tests/zoo in every format: saved by torch, imported, compared with what the file computes and with
the gradients of the module, at batch 1, 3 and 5 (a fixed batch: at that).
"""

import argparse
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

FORMATS = {
    "traced": "`torch.jit.trace`",
    "traced_frozen": "traced without gradients (torch's fast paths), then `torch.jit.freeze`",
    "scripted": "`torch.jit.script`",
    "scripted_frozen": "scripted, then `torch.jit.freeze`",
    "pt2": "`torch.export`, the batch free",
    "pt2_fixed": "`torch.export`, the batch fixed at 3",
    "pt2_decomposed": "`torch.export`, the batch free, after `run_decompositions()`",
    "onnx": "`torch.onnx.export(dynamo=True)`, the batch free",
    "onnx_legacy": "`torch.onnx.export(dynamo=False, opset_version=18)`, the batch free",
}


def survey(names: Sequence[str], dtype: torch.dtype) -> dict[tuple[str, str], Any]:
    """The outcome of every cell."""
    from zoo.cells import cell

    found = {}
    for name in names:
        for how in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                outcome = found[name, how] = cell(name, how, Path(folder), dtype)
            print(f"{name:24} {how:16} {written(outcome)} {outcome.message}", flush=True)
    return found


def written(outcome: Any) -> str:
    """A cell of the table: the verdict, and the errors of outputs and of gradients."""
    if outcome.verdict in ("ok", "wrong"):
        errors = (f"{error:.0e}" if error else "0" for error in (outcome.outputs, outcome.gradients))
        return f"{outcome.verdict} {', '.join(errors)}"
    return str(outcome.verdict)


INTRODUCTION = """# Architectures and formats

Written by `python bench/zoo.py --markdown bench/zoo.md`. Every architecture of `tests/zoo` in every format, saved by
torch and imported. A cell holds the largest errors of outputs and of input gradients, relative to the largest element,
at batch 1, 3 and 5. *ok* is at most 1e-10, for ONNX 1e-6 since its exporters round constants to single precision, and
1e-5 for float32. *not saved*: torch itself cannot.
"""


def markdown(found: Mapping[tuple[str, str], Any], names: Sequence[str], dtype: torch.dtype, seconds: float) -> str:
    """The table, and the reasons below it."""
    verdicts = [outcome.verdict for outcome in found.values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("ok", "refused", "wrong", "not saved"))
    lines = [
        INTRODUCTION,
        f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, Python {platform.python_version()};"
        f" {len(found)} cells in {seconds:.0f} s: {counts}.",
        "",
        f"| | {' | '.join(FORMATS)} |",
        f"|---|{'---|' * len(FORMATS)}",
        *(f"| {name} | {' | '.join(written(found[name, how]) for how in FORMATS)} |" for name in names),
        "",
        *(f"- *{how}*: {meaning}" for how, meaning in FORMATS.items()),
        "",
        "| cell | | reason |",
        "|---|---|---|",
    ]
    for (name, how), outcome in found.items():
        if outcome.message:
            reason = outcome.message.replace("|", "\\|").replace("\x1b[96m", "").replace("\x1b[0m", "")
            lines.append(f"| {name}, {how} | {outcome.verdict} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    from zoo import ZOO

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all when none is given")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    names, dtype, started = arguments.names or list(ZOO), getattr(torch, arguments.dtype), time.perf_counter()
    found = survey(names, dtype)
    text = markdown(found, names, dtype, time.perf_counter() - started)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
