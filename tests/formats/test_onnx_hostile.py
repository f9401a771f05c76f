"""ONNX files that are broken or meant to harm: one ModelError with one line, no crash, no hang, no memory."""

import os
import random
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_cases import built, ints, model, node, normal, saved

from attrcli.errors import ModelError
from attrcli.formats.onnx import Onnx
from attrcli.graph import bounded


def refused(proto: onnx.ModelProto, folder: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        built(saved(proto, folder))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500


# -- graphs that are none ----------------------------------------------------------------------------------------------

ORDERS = {
    "a node that reads itself": [node("Add", "x y", "y")],
    "a cycle": [node("Add", "x b", "a"), node("Neg", "a", "b"), node("Relu", "b", "y")],
    "a node before what it reads": [node("Relu", "a", "y"), node("Neg", "x", "a")],
}


@pytest.mark.parametrize("name", ORDERS)
def test_cyclic_or_disordered_graphs(name: str, tmp_path: Path) -> None:
    refused(model(ORDERS[name], {"x": ("N", 4)}), tmp_path, "which nothing before it makes|no node makes the output")


def test_names_that_are_there_twice(tmp_path: Path) -> None:
    refused(model([node("Neg", "x", "y"), node("Abs", "x", "y")], {"x": ("N", 4)}), tmp_path, "'y' is there twice")
    proto = model([node("Neg", "x", "y")], {"x": ("N", 4)})
    proto.graph.input.append(proto.graph.input[0])
    refused(proto, tmp_path, "'x' is there twice")


def test_an_output_that_nobody_makes(tmp_path: Path) -> None:
    refused(model([node("Neg", "x", "a")], {"x": ("N", 4)}), tmp_path, "no node makes the output 'y'")


def test_a_name_of_a_megabyte_is_cut(tmp_path: Path) -> None:
    long = "n\n" * (1 << 20)
    refused(model([helper.make_node("Neg", [long], ["y"], name=long)], {"x": ("N", 4)}), tmp_path, "nothing before it")


# -- sizes -------------------------------------------------------------------------------------------------------------


def doubling(count: int, op: str) -> list[onnx.NodeProto]:
    nodes = [node("Shape", "x", "v0")]
    for i in range(count):
        attributes = {"axis": 0} if op == "Concat" else {}
        nodes.append(node(op, f"v{i} v{i}", f"v{i + 1}", **attributes))
    return [*nodes, node("Reshape", f"x v{count}", "y")]


MOST = np.int64(1 << 50)
LONG = ints(0, 1 << 40)
HUGE = {
    "shapes that grow": (doubling(60, "Concat"), {}, "sizes in one tensor"),
    "sizes that grow": (doubling(80, "Mul"), {}, "beyond 63 bits|batch size"),
    "a constant of absurd shape": ([node("ConstantOfShape", "huge", "c"), node("Add", "x c", "y")], {}, "elements"),
    "constants that broadcast": (
        [
            node("Expand", "one wide", "a"),
            node("Reshape", "a tall", "b"),
            node("Add", "a b", "c"),
            node("ReduceSum", "c", "d", keepdims=0),
            node("Add", "x d", "y"),
        ],
        {"wide": ints(1 << 18), "tall": ints(1 << 18, 1)},
        "elements made from constants",
    ),
    "many large constants": (
        [
            *(node("Expand", "one wide", f"c{i}") for i in range(64)),
            *(node("ReduceSum", f"c{i}", f"r{i}", keepdims=0) for i in range(64)),
            *(node("Add", f"{'x' if not i else f's{i - 1}'} r{i}", f"s{i}") for i in range(64)),
            node("Identity", "s63", "y"),
        ],
        {"wide": ints(1 << 24, 1)},
        "elements made from constants",
    ),
    "a product of constants": (
        [
            node("Expand", "one wide", "a"),
            node("MatMul", "a a", "c"),
            node("ReduceSum", "c", "d", keepdims=0),
            node("Add", "x d", "y"),
        ],
        {"wide": ints(1 << 13, 1 << 13)},
        "too large to compute",
    ),
    "a resize": ([node("Resize", "x  scales", "y")], {"scales": np.array([1, 1e9], np.float32)}, "Resize"),
    "a range": ([node("Range", "zero most step", "r"), node("Add", "x r", "y")], {"most": MOST}, "elements"),
    "a tile": ([node("Tile", "one wide", "t"), node("Add", "x t", "y")], {"wide": ints(1 << 40)}, "elements"),
    "a pad": ([node("Pad", "x wide", "y", mode="edge")], {"wide": ints(0, 0, 0, 1 << 40)}, "elements"),
    "a pad of a constant": ([node("Pad", "one wide", "c"), node("Add", "x c", "y")], {"wide": LONG}, "elements"),
    "a window": ([node("Unsqueeze", "x axis", "u"), node("AveragePool", "u", "y", kernel_shape=[1 << 40], pads=[1, 2])],
                 {"axis": ints(1)}, "windows of"),
    "a split": ([helper.make_node("Split", ["x"], ["y"], name="s", axis=1, num_outputs=1 << 40)], {}, "parts"),
    "a one-hot": ([node("Cast", "x", "i", to=TensorProto.INT64), node("OneHot", "i most pair", "y")],
                  {"most": MOST, "pair": np.array([0, 1], np.float32)}, "elements"),
    "a loop": (
        [helper.make_node("Loop", ["most", "", "x"], ["y"], name="l", body=helper.make_graph(
            [node("Identity", "c", "d"), node("Neg", "v", "w")], "b",
            [onnx.ValueInfoProto(name=name) for name in "icv"], [onnx.ValueInfoProto(name=name) for name in "dw"]))],
        {"most": MOST},
        r"unrolls to more than 30000 steps.*in the loop at node 'l' \(Loop\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_small_files_that_ask_for_much(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MOST_STEPS", 30_000)
    nodes, extra, match = HUGE[name]
    constants = {
        "one": np.ones(1, np.float32), "huge": ints(1 << 20, 1 << 20), "zero": np.int64(0), "step": np.int64(1), **extra
    }  # fmt: skip
    used = {item for entry in nodes for item in entry.input}
    nodes = [_without_gaps(entry) for entry in nodes]
    proto = model(nodes, {"x": ("N", 4)}, constants={key: value for key, value in constants.items() if key in used})
    refused(proto, tmp_path, match)


def _without_gaps(entry: onnx.NodeProto) -> onnx.NodeProto:
    """Resize has an input that is left out: the region."""
    if entry.op_type == "Resize":
        entry.input[:] = ["x", "", "scales"]
    return entry


@pytest.mark.parametrize("field", ["raw_data", "float_data"])
def test_shapes_beyond_the_data(field: str, tmp_path: Path) -> None:
    for sizes in ([1 << 34], [1 << 20, 1 << 19], [3, 5], [1 << 62, 1 << 62, 0]):
        proto = model([node("Add", "x w", "y")], {"x": ("N", 4)})
        entry = TensorProto(name="w", dims=sizes, data_type=TensorProto.FLOAT)
        if field == "raw_data":
            entry.raw_data = b"\0" * 16
        else:
            entry.float_data.extend([0.0] * 4)
        proto.graph.initializer.append(entry)
        refused(proto, tmp_path, "does not fit its shape|elements")


def test_messages_inside_one_another(tmp_path: Path) -> None:
    data = b""
    while len(data) < 1 << 19:  # field 5 of an attribute is a tensor's, 6 a graph's: any length-delimited field will do
        data = b"\x32" + _varint(len(data)) + data
    (tmp_path / "deep.onnx").write_bytes(b"\x08\x08\x42\x02\x10\x12\x3a" + _varint(len(data)) + data)
    with pytest.raises(ModelError, match=r"not an ONNX model|no inputs"):
        Onnx(tmp_path / "deep.onnx")


def test_subgraphs_inside_one_another(tmp_path: Path) -> None:
    inner = helper.make_graph([node("Neg", "x", "o")], "g", [], [onnx.ValueInfoProto(name="o")])
    for i in range(30):
        empty = helper.make_graph([], "e", [], [onnx.ValueInfoProto(name="x")])
        branch = helper.make_node("If", ["yes"], [f"o{i}"], name=f"if{i}", then_branch=inner, else_branch=empty)
        inner = helper.make_graph([branch], "g", [], [onnx.ValueInfoProto(name=f"o{i}")])
    proto = model(list(inner.node), {"x": ("N", 4)}, ["o29"], {"yes": np.bool_(True)})
    assert built(saved(proto, tmp_path))(torch.ones(2, 4))[0].sum() == -8


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


# -- external data -----------------------------------------------------------------------------------------------------


def external(folder: Path, count: int = 1, **facts: object) -> onnx.ModelProto:
    names = [f"w{i}" for i in range(count)]
    nodes = [node("Add", f"{'x' if not i else f's{i - 1}'} {name}", f"s{i}") for i, name in enumerate(names)]
    proto = model([*nodes, node("Neg", f"s{count - 1}", "y")], {"x": ("N", 1024)})
    for name in names:
        entry = TensorProto(name=name, dims=[1024], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": "w.bin", **facts}.items():
            entry.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
        proto.graph.initializer.append(entry)
    (folder / "w.bin").write_bytes(b"\0" * 4096)
    return proto


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"length": 4097}, "do not fit"),
        ({"offset": 1}, "not all in"),
        ({"offset": -1}, "not all in"),
        ({"offset": "many"}, "not a number"),
        ({"offset": 1 << 70}, "not all in"),
        ({"location": "n" * 300}, "cannot be found|missing"),
        ({"location": "loop"}, "cannot be found|missing"),
        ({"location": "."}, "is no file but a directory"),
        ({"location": "pipe"}, "is no file but a directory, a pipe"),
        ({"location": "nothing"}, "is missing beside the model"),
    ],
)
def test_external_data_that_is_not_there(facts: dict[str, Any], match: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    refused(external(tmp_path, **facts), tmp_path, match)


def test_many_tensors_of_the_same_bytes(tmp_path: Path) -> None:
    built(saved(external(tmp_path, 2), tmp_path))
    refused(external(tmp_path, 3), tmp_path, "that of other tensors")


# -- fuzzing -----------------------------------------------------------------------------------------------------------

CHILD = """
import os, resource, signal, struct, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from attrcli.errors import ModelError
from attrcli.formats.onnx import Onnx
from attrcli.formats.spec import Sample
from attrcli.graph.build import FREE
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
for name in sorted(Path(sys.argv[1]).glob("*.onnx")):
    signal.alarm(20)
    print(name.name, flush=True)
    try:
        source = Onnx(name)
        samples = {s.name: Sample(tuple(i or 4 for i in (s.shape or (1,))[1:]), s.dtype) for s in source.inputs}
        source.operations(), source.parameter_count(), source.build(samples, torch.float32, FREE)
        print("built", flush=True)
    except ModelError as error:
        assert "\\n" not in str(error) and len(str(error)) < 3000, repr(error)[:200]
        print("refused", flush=True)
"""


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One of: bytes changed, a stretch cut, doubled or zeroed, the end cut, a number made extreme."""
    held, kind = bytearray(data), chance.randrange(6)
    if kind == 0:
        for _ in range(chance.randint(1, 8)):
            held[chance.randrange(len(held))] = chance.randrange(256)
        return bytes(held)
    start = chance.randrange(len(held))
    end = min(len(held), start + chance.choice([1, 2, 8, 64, 512]))
    if kind == 1:
        del held[start:end]
    elif kind == 2:
        held[start:start] = held[start:end]
    elif kind == 3:
        held[start:end] = bytes(end - start)
    elif kind == 4:
        del held[chance.randrange(len(held)) :]
    else:
        extreme = [b"\xff" * 9 + b"\x01", b"\x80" * 4 + b"\x08", b"\xff\xff\xff\xff\x07", struct.pack("<f", 1e30)]
        piece = chance.choice(extreme)
        held[start : start + len(piece)] = piece
    return bytes(held)


def seeds() -> Sequence[bytes]:
    """Small models that together hold most kinds of nodes: layers, shapes, loops, functions, quantised ops."""
    from test_onnx_families import FLOWS, LAYERS, flow, function, quantised, with_functions

    weight = normal(4, 3, 3, 3)
    layers = model(
        [
            node("Conv", "x w", "a", pads=[1, 1, 1, 1]),
            node("BatchNormalization", "a s s s v", "b"),
            node("Relu", "b", "c"),
            node("MaxPool", "c", "d", kernel_shape=[2, 2], strides=[2, 2]),
            node("Resize", "d", "e", mode="linear"),
            node("GlobalAveragePool", "e", "f"),
            node("Flatten", "f", "g"),
            node("Gemm", "g m n", "y", transB=1),
        ],
        {"x": ("N", 3, 8, 8)},
        constants={"w": weight, "s": normal(4), "v": np.ones(4, np.float32), "m": normal(5, 4), "n": normal(5),
                   "scales": np.array([1, 1, 2, 2], np.float32)},
    )  # fmt: skip
    layers.graph.node[4].input[:] = ["d", "", "scales"]
    shapes = model(
        [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "n"),
            node("Unsqueeze", "n axes", "n1"),
            node("Concat", "n1 minus", "t", axis=0),
            node("Reshape", "x t", "r"),
            node("Slice", "r from to axes1", "u"),
            node("Pad", "u pads", "p"),
            node("Transpose", "p", "q", perm=[1, 0]),
            node("Softmax", "q", "y", axis=0),
        ],
        {"x": ("N", 4, 6)},
        constants={"zero": np.int64(0), "axes": ints(0), "minus": ints(-1), "from": ints(1), "to": ints(9),
                   "axes1": ints(1), "pads": ints(0, 1, 0, 1)},
    )  # fmt: skip
    inner = function("Inner", [node("LeakyRelu", "a", "r", alpha=0.1)])
    local = with_functions([node("Inner", "x", "h", domain="local"), node("Exp", "h", "y")], inner)
    protos = [layers, shapes, local, LAYERS["LSTM bidirectional"], LAYERS["GRU clipped"], quantised("QLinearConv"),
              quantised("QLinearMatMul"), *(flow(name) for name in FLOWS)]  # fmt: skip
    return [proto.SerializeToString() for proto in protos]


@pytest.mark.slow
def test_500_mutated_files_end_in_one_line(tmp_path: Path) -> None:
    chance, held = random.Random(0), seeds()
    for i in range(500):
        data = chance.choice(held)
        for _ in range(chance.randint(1, 3)):
            data = mutated(data, chance) or b"\0"
        (tmp_path / f"{i:03}.onnx").write_bytes(data)
    limit = 4 << 30
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    lines = child.stdout.split("\n")
    assert child.returncode == 0, f"{lines[-3:]}: {child.stderr[-2000:]}"
    ends = lines.count("built") + lines.count("refused")
    assert ends == 500
    assert lines.count("refused") > 200


def test_data_in_numpy_types_that_torch_has_not(tmp_path: Path) -> None:
    proto = model([node("Add", "x w", "y")], {"x": ("N", 2)})
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1 + 2j, 0], np.complex64), "w"))
    refused(proto, tmp_path, "reads 'w', which nothing before it makes in a supported type")
