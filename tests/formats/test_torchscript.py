"""TorchScript: outputs and gradients of the graph are the ScriptModule's; what cannot be walked is refused by name."""

import os
import pickle
import random
import zipfile
from contextlib import suppress
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from nets import (
    ANY_WAY,
    Residual,
    Scripted,
    assert_close,
    assert_same,
    build,
    load_script,
    quiet,
    ready,
    save_scripted,
    save_traced,
)
from torch import Tensor, nn

from attrcli import formats
from attrcli.errors import AttrcliWarning, ModelError, TooLarge, UnsupportedOp
from attrcli.formats.spec import Sample
from attrcli.graph.build import FREE

# --- right


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=pytest.mark.slow if how == "frozen" and i % 2 else ())
        for i, name in enumerate(ANY_WAY)
        for how in ("traced", "scripted", "frozen")
    ],
)
def test_outputs_and_gradients_are_the_script_modules(name, how, tmp_path):
    if how == "traced" and name == "tied":
        pytest.skip("a trace does not take a module that holds one parameter under two names")
    make, shape = ANY_WAY[name]
    module, path = ready(make()), tmp_path / "net.pt"
    if how == "traced":
        save_traced(module, shape, path)
    else:
        save_scripted(module, path, frozen=how == "frozen")
    assert_same(build(path, shape), load_script(path), shape)


@pytest.mark.parametrize("frozen", [False, True])
def test_loops_branches_and_containers_that_only_scripting_keeps(frozen, tmp_path):
    path = save_scripted(ready(Scripted()), tmp_path / "net.pt", frozen=frozen)
    for shape in ((3, 4), (5, 4)):  # unrolled for the shape that is asked for
        assert_same(build(path, shape), load_script(path), shape)


class Several(nn.Module):
    """Two inputs, one argument with a default, a dictionary of outputs."""

    def forward(self, x: Tensor, y: Tensor, mask: Optional[Tensor] = None, scale: float = 2.0) -> dict[str, Tensor]:  # noqa: UP045
        if mask is not None:
            x = x * mask
        return {"sum": x + y, "scaled": x * scale}


def test_several_inputs_and_outputs_have_the_files_names(tmp_path):
    source = formats.load(save_scripted(Several(), tmp_path / "net.pt"))
    assert [spec.name for spec in source.inputs] == ["x", "y"]
    sample = Sample((3,), torch.float32)
    graph = source.build({"x": sample, "y": sample}, torch.float64, FREE)
    assert graph.meta["outputs"] == ("sum", "scaled")
    x, y = torch.rand(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    assert torch.equal(graph(x, y)[0], x + y)
    assert torch.equal(graph(x, y)[1], x * 2)


def test_stored_tensors_keep_their_names_and_a_tied_weight_is_one(tmp_path):
    path = save_scripted(ready(ANY_WAY["tied"][0]()), tmp_path / "net.pt")
    graph = build(path, (5,))
    assert [name for name, _ in graph.named_parameters()] == ["weight"]
    assert {name for name, _ in graph.named_buffers()} >= {"scale", "shift"}
    assert formats.load(path).parameter_count() == 25


def test_a_frozen_file_has_no_parameters(tmp_path):
    source = formats.load(save_scripted(ready(Residual()), tmp_path / "net.pt", frozen=True))
    assert source.parameter_count() == 0
    assert source.operations()["aten::conv2d"] == 2


def test_saved_in_training_mode_a_scripted_model_is_read_for_inference(tmp_path):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double().train()
    path = save_scripted(module, tmp_path / "net.pt")
    with pytest.warns(AttrcliWarning, match=r"saved in training mode \(1\); it is explained as in inference"):
        graph = build(path, (3,))
    assert_same(graph, module.eval(), (3,))


def test_hardsigmoid_has_its_own_gradient_in_double_precision(tmp_path):
    """torch's is off by 5e-9: it holds 1/6 in single precision."""
    path = save_traced(nn.Hardsigmoid(), (7,), tmp_path / "net.pt")
    x = torch.linspace(-4, 4, 7, dtype=torch.float64)[None].requires_grad_()
    y = build(path, (7,))(x)[0]
    assert_close(y, F.hardsigmoid(x))
    inside = (x.abs() < 3).double()
    assert_close(torch.autograd.grad(y.sum(), x)[0], inside / 6, 1e-15)


def test_metadata_is_what_the_extra_files_hold(tmp_path):
    with quiet():
        torch.jit.script(nn.ReLU()).save(str(tmp_path / "net.pt"), _extra_files={"attrcli.toml": "[input]"})
    assert formats.load(tmp_path / "net.pt").metadata["attrcli.toml"] == "[input]"


# --- the batch


class HalfTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.size(0) // 2) + x.size(0) % 3


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze()


class Checked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        assert x.size(0) > 0 and x.shape == y.shape  # noqa: PT018
        if [x.size(0), 3] == y.size() and x.size(0) in x.shape:
            y = y + x.numel() // x.size(0)
        return y


def test_whole_division_of_the_batch_is_no_constant(tmp_path):
    path = save_scripted(HalfTheBatch(), tmp_path / "net.pt")
    assert_same(build(path, (3,)), load_script(path), (3,), (1, 2, 3, 4, 7, 40))


def test_a_squeeze_keeps_a_batch_of_one(tmp_path):
    path = save_scripted(ready(Squeezed()), tmp_path / "net.pt")
    graph, oracle = build(path, (3,)), load_script(path)
    assert_same(graph, oracle, (3,), (2, 5))
    assert graph(torch.zeros(1, 3, dtype=torch.float64))[0].shape == (1,)


def test_conditions_that_hold_for_every_batch_are_followed(tmp_path):
    path = save_scripted(Checked(), tmp_path / "net.pt")
    assert_same(build(path, (3,)), load_script(path), (3,))


# --- refused, with the op and the line


class DataIf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return x


class DataWhile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while bool(x.max() > 1):
            x = x / 2
        return x


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * int(x[0, 0])


class BatchIf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) == 1:
            x = -x
        return x


class BatchIfLarge(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) < 2000:
            x = -x
        return x if x.size(0) < 200 else x * 2


class BatchDivided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + x.size(0) // 100)


class BatchLoop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.size(0)):
            x = x * 2
        return x


class Counts(nn.Module):
    calls: int

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError("images only")
        return x


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


class ShapeInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.unsqueeze_(1)
        return y


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        i = 0
        while i >= 0:
            i += 1
        return x


REFUSED = {
    "data if": (DataIf, (3,), UnsupportedOp, "input's data.*torch.sum"),
    "data while": (DataWhile, (3,), UnsupportedOp, "input's data.*torch.max"),
    "item": (Item, (3,), UnsupportedOp, "input's data.*torch.mul"),
    "batch if": (BatchIf, (3,), UnsupportedOp, "eq of a number that depends on the batch size.*torch.eq"),
    "large batch if": (BatchIfLarge, (3,), UnsupportedOp, "lt of a number that depends on the batch.*torch.lt.*200"),
    "batch divided": (BatchDivided, (3,), UnsupportedOp, "floordiv of a number that depends.*torch.floordiv.*100"),
    "batch loop": (BatchLoop, (3,), UnsupportedOp, "number of rounds depends on the batch size"),
    "state": (Counts, (3,), UnsupportedOp, "SetAttr: the model changes its own state: it reads 'calls', and sets it"),
    "raise": (Raises, (3,), ModelError, "the model raises: .*images only"),
    "inverse": (Inverse, (3, 3), UnsupportedOp, "op aten.linalg_inv.*not supported.*linalg.inv\\(x\\)\\); exporting"),
    "shape in place": (ShapeInPlace, (3,), UnsupportedOp, "unsqueeze_.*shape changes in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_line(name, tmp_path):
    make, shape, error, message = REFUSED[name]
    path = save_scripted(make(), tmp_path / "net.pt")
    with pytest.raises(error, match=message) as caught:
        build(path, shape)
    assert name == "state" or "test_torchscript.py:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loop_that_does_not_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("attrcli.graph.bounded.MOST_STEPS", 1000)
    with pytest.raises(TooLarge, match=r"more than 1000 steps.*in the loop at test_torchscript\.py:\d+: while "):
        build(save_scripted(Endless(), tmp_path / "net.pt"), (3,))


@pytest.mark.parametrize(
    ("layer", "message"), [(nn.Dropout(0.5), "dropout in training"), (nn.BatchNorm1d(3), "batch norm in training")]
)
def test_traced_in_training_mode_is_refused(layer, message, tmp_path):
    path = save_traced(nn.Sequential(nn.Linear(3, 3), layer).train(), (3,), tmp_path / "net.pt")
    with pytest.raises(UnsupportedOp, match=f"{message} mode: save the model after model.eval"):
        build(path, (3,))


class TakesNumber(nn.Module):
    def forward(self, x: Tensor, n: int) -> Tensor:
        return x * n


def test_an_argument_that_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"net\.pt: forward takes 'n', a int"):
        formats.load(save_scripted(TakesNumber(), tmp_path / "net.pt"))


def test_forward_hooks_of_the_model_are_refused(tmp_path):
    module = torch.nn.ReLU()

    def hook(self: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output * 2

    module.register_forward_hook(hook)
    with pytest.raises(ModelError, match="forward hooks"):
        formats.load(save_scripted(module, tmp_path / "net.pt"))


# --- hostile archives


def rewritten(source, target, edit):
    """Copy an archive, each entry through edit(name without the folder, data), which may return None to drop it."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for entry in archive.infolist():
            data = edit(entry.filename.partition("/")[2], archive.read(entry))
            if data is not None:
                copy.writestr(entry.filename, data)
    return target


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def with_code(tmp_path, line, *, runs_at_load=True):
    """A file whose code holds a line in a method that torch.jit.load runs."""
    method = "__setstate__" if runs_at_load else "other"
    body = f"  def {method}(self: __torch__.PLACE.Holder,\n    state: Tuple[Tensor, bool]) -> NoneType:\n"
    state = "    self.weight = (state)[0]\n    self.training = (state)[1]\n    return None\n"
    getter = (
        "  def __getstate__(self: __torch__.PLACE.Holder) -> Tuple[Tensor, bool]:\n    return (self.weight, True)\n"
    )
    path = save_scripted(Holder(), tmp_path / "plain.pt")

    def edit(name, data):
        if not (name.startswith("code/") and name.endswith("test_torchscript.py")):
            return None if name.endswith(".debug_pkl") else data
        text = (getter if runs_at_load else "") + body + f"    {line}\n" + state
        return data + text.replace("PLACE.Holder", name[len("code/__torch__/") : -3] + ".Holder").encode()

    return rewritten(path, tmp_path / "evil.pt", edit)


HOSTILE_LINES = {
    "save": '_0 = torch.save(torch.ones([2]), "{file}")',
    "save, spaced": '_0 = torch . save (torch.ones([2]), "{file}")',
    "load": '_0 = torch.load("{file}")',
    "from_file": '_0 = torch.from_file("{file}", False, 2)',
}


@pytest.mark.parametrize("runs_at_load", [True, False])
@pytest.mark.parametrize("name", HOSTILE_LINES)
def test_code_that_could_act_is_refused_and_does_not(name, runs_at_load, tmp_path):
    file = tmp_path / "written"
    path = with_code(tmp_path, HOSTILE_LINES[name].format(file=file), runs_at_load=runs_at_load)
    with pytest.raises(ModelError, match=r"evil\.pt: refused: its code .* uses"):
        formats.load(path)
    assert not file.exists()


@pytest.mark.parametrize("define", ["def __setstate__", "def \\\n    __setstate__", "def\t__setstate__"])
def test_a_method_that_runs_at_load_is_refused_however_it_is_written(define, tmp_path):
    path = with_code(tmp_path, "_0 = 1")
    evil = rewritten(path, tmp_path / "spelt.pt", lambda name, data: data.replace(b"def __setstate__", define.encode()))
    with pytest.raises(ModelError, match="__setstate__"):
        formats.load(evil)


def test_the_refused_file_would_have_acted(tmp_path):
    """That the tests above test something: torch itself runs the method while it loads the file."""
    (tmp_path / "written").unlink(missing_ok=True)
    module = tmp_path / "acts.pt"
    save_scripted(Acts(str(tmp_path / "written")), module)
    (tmp_path / "written").unlink(missing_ok=True)
    with quiet():
        torch.jit.load(module)
    assert (tmp_path / "written").exists()
    (tmp_path / "written").unlink()
    with pytest.raises(ModelError, match="__setstate__"):
        formats.load(module)
    assert not (tmp_path / "written").exists()
    formats.load(module, trusted=True)
    assert (tmp_path / "written").exists()


class Acts(nn.Module):
    file: str

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.file, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.file = state[0]
        self.training = state[1]
        torch.save(torch.ones(2), self.file)


@pytest.mark.parametrize("name", ["model.json", "Code/x.py", "code/x.PY", "../x", "attributes.bin"])
def test_an_entry_that_torch_does_not_write_is_refused(name, tmp_path):
    path = save_scripted(nn.ReLU(), tmp_path / "net.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"net/{name}", b"x")
    with pytest.raises(ModelError, match="refused: unexpected entry"):
        formats.load(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path):
    path = save_scripted(nn.ReLU(), tmp_path / "net.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("net/data.pkl", b"x")
    with pytest.raises(ModelError, match="two entries of one name"):
        formats.load(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = save_scripted(nn.ReLU(), tmp_path / "net.pt")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/extra/bomb", bytes(1 << 27))
    with pytest.raises(ModelError, match="is 134217728 bytes in a file of"):
        formats.load(path)


@pytest.mark.parametrize("entry", ["data.pkl", "constants.pkl", "version", "code/"])
@pytest.mark.parametrize("change", [lambda d: None, lambda d: b"", lambda d: d[: len(d) // 2], lambda d: d[::-1]])
def test_a_damaged_entry_is_a_model_error(entry, change, tmp_path):
    if entry == "version" and change(b"34"):
        pytest.skip("still a version")
    path = save_scripted(ready(Holder()), tmp_path / "net.pt")
    evil = rewritten(path, tmp_path / "evil.pt", lambda n, d: change(d) if n.startswith(entry) else d)
    with pytest.raises(ModelError, match=r"evil\.pt: "):
        formats.load(evil).build({"x": Sample((2,), torch.float32)}, torch.float32, FREE)


@pytest.mark.parametrize("entry", ["data.pkl", "constants.pkl"])
def test_a_pickle_that_names_a_foreign_function_is_refused_by_name(entry, tmp_path):
    class Acts:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/acted",)

    path = save_scripted(ready(Holder()), tmp_path / "net.pt")
    evil = rewritten(path, tmp_path / "e.pt", lambda n, d: pickle.dumps(Acts(), protocol=2) if n == entry else d)
    with pytest.raises(ModelError, match=rf"refused: {entry} names '(posix|nt)\.system', a class or function outside"):
        formats.load(evil)
    assert not (tmp_path / "acted").exists()


def test_classes_written_in_cpp_are_refused(tmp_path):
    path = save_scripted(ready(Holder()), tmp_path / "net.pt")

    def edit(name, data):
        return (
            data.replace(b"def forward", b"# __torch__.torch.classes.x.Y\n  def forward") if "code/" in name else data
        )

    with pytest.raises(ModelError, match="a class written in C"):
        formats.load(rewritten(path, tmp_path / "evil.pt", edit))


def changed(data, draw):
    """Some bytes flipped, dropped or repeated."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 3, 20])):
        place, kind = draw.randrange(len(data)), draw.randrange(3)
        if kind == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place : place + draw.randrange(1, 20)]
        else:
            data[place:place] = data[draw.randrange(len(data)) :][:20]
        data = data or bytearray(b"x")
    return bytes(data)


def test_contents_changed_under_a_right_checksum_are_model_errors(tmp_path):
    path = save_scripted(ready(Residual()), tmp_path / "net.pt")
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist() if "/data/" not in name]
    sound = 0
    for seed in range(80):
        draw = random.Random(seed)
        chosen = draw.choice(names)
        evil = rewritten(
            path, tmp_path / "evil.pt", lambda n, d, c=chosen, r=draw: changed(d, r) if n == c and d else d
        )
        with suppress(ModelError):
            build(evil, (3, 6, 6))
            sound += 1
    assert 10 < sound < 70  # what only holds lines of the source may be anything


def test_tensors_beyond_the_bytes_that_hold_them_are_refused(tmp_path):
    """torch crashes when it reads one, at once or when the model runs."""
    path = save_scripted(ready(Holder()), tmp_path / "net.pt")
    with zipfile.ZipFile(path) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith("data/0"))
        pickled = archive.read("net/data.pkl")
    assert archive.getinfo(entry).file_size == 16
    count, stride = pickled.index(b"K\x02tQ"), pickled.index(b"K\x01t", pickled.index(b"tQ"))
    damages = {
        "short": ("data/0", lambda data: data[:8]),
        "empty": ("data/0", lambda data: b""),
        "missing": ("data/0", lambda data: None),
        "more": ("data.pkl", lambda data: data[:count] + b"K\x03tQ" + data[count + 4 :]),
        "spread": ("data.pkl", lambda data: data[:stride] + b"K\x02t" + data[stride + 3 :]),
        "other types": ("data.pkl", lambda data: data.replace(b"DoubleStorage", b"ComplexDoubleStorage")),
        "no types": ("data.pkl", lambda data: data.replace(b"DoubleStorage", b"QInt8Storage")),
    }
    for place, change in damages.values():
        evil = rewritten(path, tmp_path / "evil.pt", lambda n, d, p=place, c=change: c(d) if n == p else d)
        with pytest.raises(ModelError, match=r"evil\.pt: .*data\.pkl describes a tensor beyond the bytes"):
            formats.load(evil)


def test_the_example_that_a_trace_was_made_with_is_left_out(tmp_path):
    path = save_traced(ready(nn.Linear(3, 2)), (3,), tmp_path / "net.pt")
    evil = rewritten(path, tmp_path / "evil.pt", lambda n, d: b"x" if n.startswith("traced_inputs") else d)
    assert_same(build(evil, (3,)), load_script(path), (3,))


def test_a_pickle_that_claims_four_gigabytes_is_refused_at_once(tmp_path):
    path = save_scripted(ready(Holder()), tmp_path / "net.pt")
    claim = b"\x80\x02X\xff\xff\xff\xff."
    evil = rewritten(path, tmp_path / "evil.pt", lambda n, d: claim if n == "data.pkl" else d)
    with pytest.raises(ModelError, match=r"evil\.pt: a damaged TorchScript archive: data\.pkl is no pickle"):
        formats.load(evil)
    lines = rewritten(path, tmp_path / "lines.pt", lambda n, d: claim if n.endswith(".debug_pkl") else d)
    assert_same(build(lines, (2,)), load_script(path), (2,))
