"""attrcli methods."""

from dataclasses import asdict
from typing import Annotated

import typer

from attrcli.cli._app import app
from attrcli.cli._options import Debug, Json
from attrcli.cli._terminal import print_json


@app.command(epilog="Example: attrcli methods integrated_gradients")
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods; or one with its paper, cost, needs, axioms and options."""
    from attrcli import methods as registry

    if name is None:
        if as_json:
            print_json([asdict(registry.description(key)) for key in registry.METHODS])
            return
        for key, (_, summary) in registry.METHODS.items():
            print(f"{key:<22} {summary}")
        return
    described = registry.description(name)
    if as_json:
        print_json(asdict(described))
        return
    print(f"{described.name}: {described.summary}\n\n{described.text}\n")
    for key in ("paper", "cost"):
        print(f"{key + ':':<8} {getattr(described, key)}")
    print(f"needs:   {', '.join(described.needs) or 'nothing'}")
    if described.gives:
        print(f"gives:   {', '.join(described.gives)}")
    print(f"axioms:  {', '.join(described.axioms) or 'none'}")
    for option in described.options:
        print(f"\n-o {option.name}={option.default}   ({option.type})\n   {option.help}")
