"""What the commands print, and how: results to stdout, progress and messages to stderr. rich stays in here."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Report = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


def printable(text: str) -> str:
    """Text from outside with control characters escaped, so that a file name cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def complain(kind: str, message: str) -> None:
    """Write one message to stderr."""
    print(f"attrcli: {kind}: {printable(message)}", file=sys.stderr)


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """A progress bar on stderr with rate and time left; silent when that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    console = Console(stderr=True)
    shown = not quiet and sys.stderr.isatty()  # rich also believes FORCE_COLOR
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Results on stdout: 'name: value' lines, or JSON."""
    if as_json:
        print_json(facts)
        return
    width = max(len(key) for key in facts) + 1
    for key, value in facts.items():
        if isinstance(value, dict) and key in ("methods", "operations"):
            print(f"{key}:")
            for name, item in value.items():
                print(printable(f"  {name:<24} {item}"))
        elif isinstance(value, list):
            print(f"{key}:")
            for item in value:
                print(printable(f"  {item}"))
        else:
            print(printable(f"{key + ':':<{width}} {_shown(value)}"))


def print_json(value: Any) -> None:
    """One JSON document on stdout; what JSON has no number for becomes null."""

    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: plain(each) for key, each in item.items()}
        if isinstance(item, list | tuple):
            return [plain(each) for each in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item  # JSON has no NaN

    print(json.dumps(plain(value), default=str, allow_nan=False))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={_shown(item)}" for key, item in value.items())
    return "none" if value is None else str(value)
