"""`python -m attrcli` and the `attrcli` command: run the app, turn every error into its exit code."""

import os
import sys
import traceback

from attrcli.cli import app, complain
from attrcli.errors import AttrcliError


def main() -> None:
    """Run the command line. A crash exits 70, never 1: exit 1 means a failed gate and nothing else."""
    try:
        app(prog_name="attrcli")
    except AttrcliError as error:
        _traceback_if_asked()
        complain("error", str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        complain("error", "interrupted")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        _traceback_if_asked()
        complain("internal error", f"{type(error).__name__}: {error}; --debug shows where; please report it")
        sys.exit(70)


def _traceback_if_asked() -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()


if __name__ == "__main__":
    main()
