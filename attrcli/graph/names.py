"""Names of stored tensors in a module: paths that are valid, and nobody else's."""

from torch import fx, nn

RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
"""Names that a module needs for itself, so that no stored tensor can have them: 'half', 'graph', 'training', ..."""


def submodule(module: nn.Module, scope: str) -> nn.Module:
    """The submodule at a dotted path, made where it is missing."""
    for name in scope.split(".") if scope else ():
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def scopes(path: str) -> list[str]:
    """The paths above a path: 'a' and 'a.b' above 'a.b.c'."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def identifier(name: str) -> str:
    """A name that may stand in code, for any text."""
    cleaned = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
    return cleaned if cleaned and not cleaned[0].isdigit() else f"_{cleaned}" if not cleaned.isdigit() else cleaned
