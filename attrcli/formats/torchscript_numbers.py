"""What a TorchScript graph does beside its tensors: arithmetic on sizes, lists, dictionaries, strings.

Numbers that depend on the batch are Values: they are compared and computed with through the builder, never by Python.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from attrcli.graph.build import Builder, Value, leaves


def _equal(b: Builder, first: Any, second: Any) -> bool:
    """Whether two numbers, texts, or lists of them are equal, for every batch size."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(_equal(b, x, y) for x, y in zip(first, second, strict=True))
    if any(value.is_tensor for value in leaves([first, second])):
        b.refuse("a comparison of lists of tensors")
    return bool(b.number(operator.eq, first, second))


def _contains(b: Builder, container: Any, item: Any) -> bool:
    if isinstance(container, (list, tuple)):
        return any(_equal(b, item, other) for other in container)
    return item in container


def _method(name: str) -> Callable[..., Any]:
    """A method that changes its container, and returns it."""

    def run(b: Builder, container: Any, *args: Any) -> Any:
        getattr(container, name)(*args)
        return container

    return run


def _set_item(b: Builder, container: Any, key: Any, value: Any) -> Any:
    container[key] = value
    return container


def _delete(b: Builder, container: Any, key: Any) -> None:
    del container[key]


def _ordered(b: Builder, items: list[Any], *options: Any) -> list[Any]:
    """The items sorted, of which none may be a tensor or depend on the batch."""
    if leaves(items):
        b.unsupported("op aten.sort of a list of tensors, or of numbers that depend on the batch size,")
    return sorted(items, reverse=any(options))


def _sort(b: Builder, items: list[Any], *options: Any) -> None:
    items[:] = _ordered(b, items, *options)


def _places(b: Builder, items: list[Any], item: Any) -> list[int]:
    return [place for place, other in enumerate(items) if _equal(b, item, other)]


def _text(name: str) -> Callable[..., Any]:
    """A method of texts."""
    return lambda b, text, *args: getattr(str, name)(text, *(arg for arg in args if arg is not None))


def _whole(name: str) -> Callable[..., Any]:
    """A method of whole texts: the end -1, TorchScript's default, leaves nothing out, as it would in Python."""

    def found(b: Builder, text: str, part: str, start: int = 0, end: int = -1) -> Any:
        if (start, end) != (0, -1) or not part:
            b.refuse(f"{name} with a range, or of an empty text, of which TorchScript says otherwise than Python")
        return getattr(str, name)(text, part)

    return found


def _index(b: Builder, items: Any, item: Any, *within: int) -> Any:
    return _whole("index")(b, items, item, *within) if isinstance(items, str) else _places(b, items, item)[0]


def _count(b: Builder, items: Any, item: Any, *within: int) -> Any:
    return _whole("count")(b, items, item, *within) if isinstance(items, str) else len(_places(b, items, item))


def _joined(b: Builder, first: Any, second: Any) -> Any:
    """Lists or texts one behind the other, or one of them repeated."""
    if len(first) * (second if isinstance(second, int) else 1) > _MOST_ITEMS:
        b.refuse(f"a list of more than {_MOST_ITEMS} items")
    return first * second if isinstance(second, int) else first + second


_MOST_ITEMS = 1 << 20
"""Items of a list, letters of a text, from which joining is refused: a few such steps fill any memory."""


def _sum(b: Builder, numbers: list[Any]) -> Any:
    total: Any = 0
    for number in numbers:
        total = b.number(operator.add, total, number)
    return total


CONTAINERS: dict[str, Callable[..., Any]] = {
    "append": _method("append"),
    "extend": _method("extend"),
    "add_": _method("extend"),
    "insert": _method("insert"),
    "reverse": _method("reverse"),
    "update": _method("update"),
    "clear": _method("clear"),
    "Delete": _delete,
    "_set_item": _set_item,
    "pop": lambda b, container, *key: container.pop(*key),
    "__getitem__": lambda b, container, key: container[key],
    "get": lambda b, container, key, default=None: container.get(key, default),
    "__contains__": _contains,
    "len": lambda b, container: len(container),
    "list": lambda b, container: list(container),
    "copy": lambda b, container: container.copy(),
    "keys": lambda b, container: list(container.keys()),
    "values": lambda b, container: list(container.values()),
    "items": lambda b, container: list(container.items()),
    "slice": lambda b, container, start, end, step: container[start:end:step],
    "add": _joined,
    "mul": _joined,
    "sort": _sort,
    "sorted": _ordered,
    "index": _index,
    "remove": lambda b, items, item: items.pop(_places(b, items, item)[0]),
    "sum": _sum,
    "all": lambda b, items: b.number(all, items),
    "any": lambda b, items: b.number(any, items),
    "count": _count,
    **{name: _whole(name) for name in ("find", "rfind", "rindex", "startswith", "endswith")},
    "join": lambda b, text, items: text.join(items),
    **{name: _text(name) for name in ("upper", "lower", "title", "strip", "lstrip", "rstrip", "split", "partition")},
    **{name: _text(name) for name in ("rpartition", "rsplit", "replace", "isdigit")},
    "format": lambda b, text, *args: text.format(*args),
    "percentFormat": lambda b, text, *args: text % args,
    "eq": _equal,
    "ne": lambda b, first, second: not _equal(b, first, second),
}
"""aten ops on lists, tuples, dictionaries and strings, by name."""

TENSOR_FACTS: dict[str, Callable[..., Any]] = {
    "size": lambda b, x, dim=None: b.sizes(x) if dim is None else b.size(x, dim),
    "dim": lambda b, x: x.rank,
    "len": lambda b, x: b.size(x, 0),
    "numel": lambda b, x: _product(b, b.sizes(x)),
    "is_floating_point": lambda b, x: x.dtype.is_floating_point,
    "is_complex": lambda b, x: x.dtype.is_complex,
    "device": lambda b, x: torch.device("cpu"),
    "stride": lambda b, x, dim=None: _strides(b, x) if dim is None else _strides(b, x)[dim],
    "is_contiguous": lambda b, x, *_, **__: x.probes[0].is_contiguous(),
    "cpu": lambda b, x: x,
    "cuda": lambda b, x: x,
}
"""What may be asked of a tensor without reading its contents."""


def _strides(b: Builder, x: Value) -> list[int]:
    first, second = (list(tensor.stride()) for tensor in x.probes)
    if first != second:
        b.refuse("a stride that depends on the batch size")
    return first


def _product(b: Builder, numbers: list[Any]) -> Any:
    total: Any = 1
    for number in numbers:
        total = b.number(operator.mul, total, number) if total != 1 else number
    return total


def _scaled(function: Callable[[Any, Any], Any], swap: bool = False) -> Callable[..., Any]:
    """add, sub and rsub with their alpha."""

    def run(b: Builder, first: Any, second: Any, alpha: Any = 1) -> Any:
        if swap:
            first, second = second, first
        if alpha != 1:
            second = b.number(operator.mul, second, alpha)
        return b.number(function, first, second)

    return run


def _divide(b: Builder, first: Any, second: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "trunc" and not leaves([first, second]):
        return math.trunc(first / second)
    # Sizes are not negative: for what depends on the batch, floor and trunc agree.
    return b.number(operator.truediv if rounding_mode is None else operator.floordiv, first, second)


def _to_int(b: Builder, number: Any) -> Any:
    if not isinstance(number, Value):
        return int(number)
    return number if isinstance(number.probes[0], int) else b.number(math.floor, number)


def _to_float(b: Builder, number: Any) -> Any:
    return number if isinstance(number, Value) else float(number)


def _unchanged(b: Builder, number: Any, *_: Any) -> Any:
    return number


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda b, *args: b.number(function, *args)


NUMBERS: dict[str, Callable[..., Any]] = {
    "add": _scaled(operator.add),
    "sub": _scaled(operator.sub),
    "rsub": _scaled(operator.sub, swap=True),
    "mul": _plain(operator.mul),
    "div": _divide,
    "floordiv": _plain(operator.floordiv),
    "floor_divide": _plain(operator.floordiv),
    "remainder": _plain(operator.mod),
    "neg": _plain(operator.neg),
    "pow": _plain(operator.pow),
    "abs": _plain(abs),
    "sqrt": _plain(math.sqrt),
    "log": _plain(math.log),
    "exp": _plain(math.exp),
    "ceil": _plain(math.ceil),
    "floor": _plain(math.floor),
    "round": lambda b, number: float(b.number(round, number)),
    "divmod": lambda b, *pair: [b.number(operator.floordiv, *pair), b.number(operator.mod, *pair)],
    "__lshift__": _plain(operator.lshift),
    "__rshift__": _plain(operator.rshift),
    **{
        name: _plain(getattr(math, name))
        for name in (
            "sin",
            "cos",
            "tan",
            "asin",
            "acos",
            "atan",
            "atan2",
            "sinh",
            "cosh",
            "tanh",
            "asinh",
            "acosh",
            "atanh",
            "log2",
            "log10",
            "log1p",
            "expm1",
            "fmod",
            "gcd",
            "degrees",
            "radians",
            "isnan",
            "isinf",
            "isfinite",
            "copysign",
            "erf",
            "gamma",
            "lgamma",
            "trunc",
        )
    },
    "eq": _plain(operator.eq),
    "ne": _plain(operator.ne),
    "lt": _plain(operator.lt),
    "le": _plain(operator.le),
    "gt": _plain(operator.gt),
    "ge": _plain(operator.ge),
    "__not__": _plain(operator.not_),
    "__and__": _plain(operator.and_),
    "__or__": _plain(operator.or_),
    "__xor__": _plain(operator.xor),
    "Int": _to_int,
    "IntImplicit": _to_int,
    "Float": _to_float,
    "FloatImplicit": _to_float,
    "ScalarImplicit": _unchanged,
    "item": _unchanged,
    "str": _plain(str),
    "Bool": _plain(bool),
    "min": _plain(min),
    "max": _plain(max),
    "detach": _unchanged,
    "to": _unchanged,
    "__range_length": _plain(lambda low, high, step: len(range(low, high, step))),
    "__derive_index": lambda b, index, start, step: b.number(operator.add, start, b.number(operator.mul, index, step)),
}
"""Arithmetic on numbers; on one that depends on the batch only what graph/ops.py lists as Python functions."""

_KINDS: dict[str, Callable[[Any], bool]] = {
    "Tensor": lambda value: isinstance(value, Value) and value.is_tensor,
    "int": lambda value: isinstance(_concrete(value), int) and not isinstance(value, bool),
    "float": lambda value: isinstance(_concrete(value), float),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "NoneType": lambda value: value is None,
    "List": lambda value: isinstance(value, list),
    "Tuple": lambda value: isinstance(value, tuple),
    "Dict": lambda value: isinstance(value, dict),
}
"""What a value must be for a type of TorchScript; the types of the elements are not looked at."""


def _concrete(value: Any) -> Any:
    return value.probes[0] if isinstance(value, Value) else value


def is_instance(b: Builder, value: Any, kinds: list[str]) -> bool:
    """prim::isinstance, for types by their names."""
    tests = [_KINDS.get(kind.partition("[")[0]) for kind in kinds]
    if None in tests:
        b.unsupported(f"prim.isinstance of {', '.join(kinds)}")
    return any(test(value) for test in tests if test)


READS = frozenset(("Int", "Float", "Bool", "IntImplicit", "FloatImplicit", "ScalarImplicit", "item"))
"""What makes a number of a tensor."""
