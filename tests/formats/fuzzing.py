"""Damaged copies of good files, each opened in a child of its own, with limits on its memory and time."""

import json
import os
import random
import re
import resource
import signal
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from test_onnx_hostile import mutated

from attrcli import formats
from attrcli.errors import ModelError
from attrcli.formats.spec import Sample
from attrcli.graph.build import FREE

MEMORY, SECONDS = 6 << 30, 30

EXTREMES = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "64",
    "999999999",
    str(1 << 31),
    str(1 << 62),
    str(-(1 << 63)),
    "1e308",
    "-inf",
    "None",
]


def damaged(data: bytes, chance: random.Random, edit: Callable[[str, bytes, random.Random], bytes | None]) -> bytes:
    """The archive with bytes changed anywhere; or its entries, under right checksums: bytes of them, or by `edit`."""
    kind = chance.randrange(4)
    if kind == 0:
        return mutated(data, chance) or b"\0"
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as copy:
        names = archive.namelist()
        chosen = set(chance.sample(names, min(len(names), chance.choice([1, 1, 2, 5]))))
        for name in names:
            content = archive.read(name)
            if name in chosen and content and kind == 1:
                content = mutated(content, chance)
            elif kind > 1:
                content = edit(name.partition("/")[2], content, chance)
            if content is not None:
                copy.writestr(name, content)
    return out.getvalue()


def changed_code(name: str, content: bytes, chance: random.Random) -> bytes | None:
    """TorchScript: in its code, numbers and names exchanged for others, lines doubled or dropped."""
    if not name.endswith(".py") or not content:
        return content
    text = content.decode()
    for _ in range(chance.choice([1, 1, 2, 4])):
        words = list(re.finditer(r"-?\d+(?:\.\d*)?|[A-Za-z_]\w*", text))
        if not words:
            break
        word = chance.choice(words)
        kind = chance.randrange(4)
        if kind == 0:
            lines = text.split("\n")
            place = chance.randrange(len(lines))
            lines[place : place + 1] = [lines[place]] * chance.choice([0, 2])
            text = "\n".join(lines)
        elif word[0][0].isalpha() or word[0][0] == "_":
            text = text[: word.start()] + chance.choice(words)[0] + text[word.end() :]
        else:
            text = text[: word.start()] + chance.choice(EXTREMES) + text[word.end() :]
    return text.encode()


def changed_description(name: str, content: bytes, chance: random.Random) -> bytes | None:
    """torch.export: in its JSON, values exchanged for others of the file, or for extremes, or dropped."""
    if not name.endswith(".json"):
        return content
    tree = json.loads(content)
    for _ in range(chance.choice([1, 1, 2, 4])):
        places = list(_places(tree))
        holder, key = chance.choice(places)
        kind = chance.randrange(4)
        if kind == 0:
            other, place = chance.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        elif kind == 1:
            del holder[key]
        elif isinstance(holder[key], int) or kind == 2:
            holder[key] = chance.choice([0, -1, 1, 3, 1 << 31, 1 << 62, -(1 << 63), 0.5, True, None])
        else:
            holder[key] = chance.choice(["x", "", [], {}, [[[]]], {"as_int": 1 << 40}, {"as_tensor": {"name": "x"}}])
        if not tree:
            break
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON tree, without what describes sources and versions."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        if key not in ("metadata", "opset_version", "verifiers", "torch_version"):
            yield tree, key
            yield from _places(item)


def opened(path: Path, shapes: Sequence[tuple[int, ...]]) -> None:
    """Load a file, build its graph and run it."""
    source = formats.load(path)
    given = list(shapes) + [(4,)] * len(source.inputs)
    samples = {spec.name: Sample(shape, spec.dtype) for spec, shape in zip(source.inputs, given, strict=False)}
    source.operations()
    source.parameter_count()
    graph = source.build(samples, torch.float32, FREE)
    graph(*(torch.ones(2, *sample.shape, dtype=sample.dtype) for sample in samples.values()))


def ends(path: Path, shapes: Sequence[tuple[int, ...]]) -> str:
    """How opening a file ended, in a child: 'built', 'refused', or whatever else it was."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(SECONDS)
            os.close(reading)
            os.write(writing, _verdict(path, shapes).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    return said


def _verdict(path: Path, shapes: Sequence[tuple[int, ...]]) -> str:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        opened(path, shapes)
    except ModelError as error:
        message = str(error)
        return "refused" if "\n" not in message and len(message) < 3000 else f"message {message[:500]!r}"
    except BaseException:
        return traceback.format_exc()[-1500:]
    return "built"
