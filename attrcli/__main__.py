"""`python -m attrcli` and the `attrcli` command: run the app, turn every error into its exit code."""

import os
import sys
import traceback
from contextlib import suppress

from attrcli.errors import AttrcliError

try:
    from attrcli.cli import app, complain
except Exception:  # a broken installation must not look like a failed gate
    traceback.print_exc()
    sys.exit(70)


def main() -> None:
    """Run the command line. A crash exits 70, never 1: exit 1 means a failed gate and nothing else."""
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
    except OSError:  # nothing is left to be said on it; else Python tries again at exit, and complains
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
    if sys.stdout is not None:  # closed by the shell: >&-
        sys.stdout.flush()


def _say(kind: str, message: str) -> None:
    with suppress(OSError):  # stderr may be closed; the exit code still tells
        if "--debug" in sys.argv:
            traceback.print_exc()
        complain(kind, message)


if __name__ == "__main__":
    main()
