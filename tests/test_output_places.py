"""Outputs that cannot be written are told before anything is computed."""

import os

import pytest
from cli_runs import TEST, attrcli, explain, refused

from attrcli import overlays

UNWRITABLE = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write")


@pytest.mark.parametrize(
    "place", ["file/run.h5", "missing/run.h5", pytest.param("/proc/self/run.h5", marks=UNWRITABLE)]
)
def test_a_run_file_that_cannot_be_written_is_told_before_the_model_is_read(tmp_path, place):
    (tmp_path / "file").write_text("x")
    for more in ((), ("--dry-run",)):
        assert f"cannot write {tmp_path / place}" in refused(tmp_path / place, *more, model="missing.onnx")


@UNWRITABLE
def test_pictures_and_exports_that_cannot_be_written_are_told_before_any_is_made(tmp_path, monkeypatch):
    out = tmp_path / "run.h5"
    explain(out)

    def none(*_, **__):
        raise AssertionError("nothing should be made")

    monkeypatch.setattr(overlays, "_cells", none)
    monkeypatch.setattr(overlays, "_save", none)
    monkeypatch.setattr(overlays, "model_images", lambda run, root: (none, None))
    for command in (
        ("render", out, "--out", "/proc/self/grid.png"),
        ("render", out, "--out", "/proc/self"),
        ("export", out, "/proc/self", "--to", "virelay"),
        ("prune", "missing.onnx", TEST / "Bag", "--out", "/proc/self/new/out", "--criterion", "prune_grad"),
    ):
        done = attrcli(*command)
        assert done.code == 2
        assert "cannot write /proc/self" in done.err
    message = refused(tmp_path / "b.h5", "--overlays", "/proc/self")
    assert "cannot write /proc/self" in message
