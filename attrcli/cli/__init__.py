"""The command line, a file for each command: parse, call a verb, print. The only place for typer and rich.

stdout carries results, progress and messages go to stderr; heavy imports stay inside commands.
"""

from attrcli.cli import explain, export, inspect, methods, prune, render
from attrcli.cli._app import app
from attrcli.cli._terminal import complain

__all__ = ["app", "complain", "explain", "export", "inspect", "methods", "prune", "render"]
