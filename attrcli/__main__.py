"""`python -m attrcli` and the `attrcli` command: run the app, turn every error into its exit code."""

import io
import os
import sys
import traceback
from contextlib import suppress
from typing import Any

from attrcli.errors import AttrcliError, UsageError

try:
    from attrcli.cli import app, complain
except Exception:  # a broken installation must not look like a failed gate
    traceback.print_exc()
    sys.exit(70)


class _Stdout(io.FileIO):
    """Standard output. What it refuses is no crash, and only here can it be told from what other files refuse."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UsageError(f"cannot write to stdout: {os.strerror(error.errno or 0).lower()}") from error


def main() -> None:
    """Run the command line. A crash exits 70, never 1: exit 1 means a failed gate and nothing else."""
    out = sys.stdout
    if out is not None:  # closed by the shell: >&-
        raw = io.BufferedWriter(_Stdout(out.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(raw, out.encoding, out.errors, line_buffering=out.isatty())
    try:
        code = _run()
    except AttrcliError as error:
        code = error.exit_code
        _say("error", str(error))
    except KeyboardInterrupt:
        code = 130
        _say("error", "interrupted")
    except BrokenPipeError:  # whoever reads stdout has seen enough; what a shell reports for SIGPIPE
        code = 141
    except Exception as error:
        code = 70
        _say("internal error", f"{type(error).__name__}: {error}; --debug shows where; please report it")
    try:
        _flush()
    except (OSError, UsageError):  # nothing is left to be said on it; else Python tries again at exit, and complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run() -> int:
    """The app's exit code, all of stdout written. Raises what the app raises."""
    try:
        app(prog_name="attrcli")
    except SystemExit as stop:
        hidden = stop.__context__ if stop.code == 1 else None
        while hidden is not None:  # Typer exits 1 on a broken pipe, and on an EOFError, which it takes for Ctrl-D
            if isinstance(hidden, BrokenPipeError | EOFError):
                raise hidden from None
            hidden = hidden.__context__
        code = (stop.code or 0) if isinstance(stop.code, int | None) else 70
    _flush()
    return code


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _say(kind: str, message: str) -> None:
    with suppress(OSError):  # stderr may be closed; the exit code still tells
        if "--debug" in sys.argv:
            traceback.print_exc()
        complain(kind, message)


if __name__ == "__main__":
    main()
