"""The command line in this process, and small models whose answers are known by hand."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from attrcli.cli import app
from attrcli.errors import AttrcliError

torch.set_num_threads(1)  # nets this small are faster so

SAMPLES = Path(__file__).parents[1] / "sample_models"
TEST, TRAIN = SAMPLES / "images/test", SAMPLES / "images/train"
MLP, CNN = SAMPLES / "fashion_mlp.onnx", SAMPLES / "fashion_cnn.onnx"

SIDECAR = (SAMPLES / "fashion_mlp.toml").read_text().replace('labels = "labels.txt"', "")


@dataclass
class Result:
    """How a command ended, with the exit code that the process would have."""

    code: int
    out: str
    err: str


def attrcli(*arguments, stdin=None):
    """Run a command; an error gets the exit code that the process would have, its text comes last in `err`."""
    done = CliRunner().invoke(app, [str(each) for each in arguments], input=stdin)
    error = done.exception
    if isinstance(error, AttrcliError):
        return Result(error.exit_code, done.stdout, f"{done.stderr}{error}")
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return Result(done.exit_code, done.stdout, done.stderr)


def explain(out, *arguments, model=MLP, inputs=TEST / "Bag", method="saliency", code=0, stdin=None):
    """Run `explain` and require its exit code."""
    inputs = inputs if isinstance(inputs, list | tuple) else [inputs]
    done = attrcli("explain", model, *inputs, "-m", method, "--out", out, *arguments, stdin=stdin)
    assert done.code == code, f"exit {done.code}: {done.out}{done.err}"
    return done


def refused(out, *arguments, code=2, **options):
    """The message of an `explain` that must be refused, with nothing written."""
    done = explain(out, *arguments, code=code, **options)
    assert done.out == ""
    assert not Path(out).exists()
    assert not Path(f"{out}.part").exists()
    return done.err


def rows(path):
    """All datasets of a run file, texts as str, and the attributes as stored."""
    with h5py.File(path) as file:
        found = {name: file[name][...] for name in file if not file[name].is_scale}
        found["attributes"] = dict(file.attrs)
    for name in ("sample_id", "sample_sha256", "message"):
        found[name] = [text.decode() for text in found[name]]
    return found


def assert_same_rows(left, right, ids=None, **tolerance):
    """Two run files say the same of the same inputs, or of some of them: bit for bit, or within a tolerance."""
    a, b = rows(left), rows(right)
    wanted = a["sample_id"] if ids is None else ids
    for name in set(a) - {"attributes"}:
        one, two = (
            np.array([each[name][each["sample_id"].index(key)] for key in wanted]) for each in (a, b)
        )  # fmt: skip
        if tolerance and one.dtype.kind == "f":
            np.testing.assert_allclose(one, two, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(one, two, err_msg=name)


# -- inputs --------------------------------------------------------------------------------------------------------


def image(path, values):
    """Save an image (H, W) or (H, W, 3), uint8, in the format that the name says."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return Path(path)


def images(folder, count, shape=(28, 28), seed=0):
    """Some images of noise, named by number."""
    generator = np.random.default_rng(seed)
    return [image(Path(folder) / f"{i:03d}.png", generator.integers(0, 256, shape)) for i in range(count)]


# -- models --------------------------------------------------------------------------------------------------------


def onnx_file(path, nodes, inputs, outputs, weights, sidecar=None):
    """An ONNX file; `inputs` and `outputs` are name -> shape, or (shape, type); `sidecar` goes into its metadata."""

    def value(name, shape):
        kind = TensorProto.FLOAT
        if shape and isinstance(shape[0], tuple | list):
            shape, kind = shape
        return helper.make_tensor_value_info(name, kind, shape)

    initial = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(
        nodes,
        "net",
        [value(name, shape) for name, shape in inputs.items()],
        [value(name, shape) for name, shape in outputs.items()],
        initial,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if sidecar:
        helper.set_model_props(model, {"attrcli.toml": sidecar})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return Path(path)


def linear(path, weight, bias=None, head=None, sidecar=None):
    """x (N, F) -> W x + b (N, K), with a head such as Softmax."""
    weight = np.asarray(weight, np.float32)
    bias = np.zeros(len(weight), np.float32) if bias is None else np.asarray(bias, np.float32)
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["z"], transB=1)]
    if head:
        nodes.append(helper.make_node(head, ["z"], ["y"]))
    outputs = {"y" if head else "z": ["N", len(weight)]}
    return onnx_file(path, nodes, {"x": ["N", weight.shape[1]]}, outputs, {"w": weight, "b": bias}, sidecar)


def scripted(path, module, sidecar=None):
    """Save a module as TorchScript, with a sidecar inside if there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(module.eval())
        torch.jit.save(made, str(path), _extra_files={"attrcli.toml": sidecar} if sidecar else None)
    return Path(path)


def table(path, values, columns="abcdefgh", extra=None):
    """A CSV with a row for each of `values`; `extra` are more columns, name -> texts."""
    values, extra = np.atleast_2d(values), extra or {}
    header = [*extra, *columns[: values.shape[1]]]
    lines = [",".join(header)]
    for number, row in enumerate(values):
        lines.append(",".join([*(str(texts[number]) for texts in extra.values()), *(repr(float(v)) for v in row)]))
    Path(path).write_text("\n".join(lines) + "\n")
    return Path(path)
