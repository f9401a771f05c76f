"""Runs that stop and go on: nothing is lost, nothing is computed twice, and the end is that of an undisturbed run."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cli_runs import CNN, MLP, SAMPLES, SIDECAR, TEST, TRAIN, assert_same_rows, attrcli, explain, images, rows

from attrcli.errors import UsageError
from attrcli.store import RunFile, Status

RUN = [sys.executable, "-m", "attrcli"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run.h5"


@pytest.fixture
def folder(tmp_path):
    images(tmp_path / "in", 10)
    return tmp_path / "in"


def told(text):
    """The counts that `explain` prints."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key: int(value) for key, _, value in pairs if value.strip().isdecimal()}


# -- rerunning -----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_computed_again_nor_touched(folder, out, monkeypatch):
    from attrcli.methods.smoothgrad import SmoothGrad

    given = {"inputs": folder, "method": "smoothgrad"}
    explain(out, "-o", "samples=4", **given)
    os.utime(out, ns=(10**18, 10**18))
    before = out.read_bytes()
    monkeypatch.setattr(SmoothGrad, "attribute", None)  # would fail if it were called
    counts = told(explain(out, "-o", "samples=4", **given).out)
    assert (counts["computed"], counts["kept"]) == (0, 10)
    assert out.stat().st_mtime_ns == 10**18
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.glob("run.h5*")] == ["run.h5"]


def test_changed_new_and_lost_inputs(folder, out, tmp_path):
    (folder / "007.png").write_bytes(b"no image")
    explain(out, inputs=folder, code=3)
    images(tmp_path / "new", 12, seed=1)
    shutil.copy(tmp_path / "new/003.png", folder / "003.png")  # changed
    shutil.copy(tmp_path / "new/011.png", folder / "011.png")  # new
    (folder / "007.png").unlink()  # lost, and there was no row of it to lose
    counts = told(explain(out, inputs=folder).out)
    assert (counts["rows"], counts["computed"], counts["kept"]) == (10, 2, 8)
    assert (counts["inputs_added"], counts["inputs_removed"]) == (1, 1)
    explain(tmp_path / "fresh.h5", inputs=folder)
    assert_same_rows(out, tmp_path / "fresh.h5", rtol=1e-4, atol=1e-5)


def test_fewer_inputs_never_drop_finished_rows(folder, out, tmp_path):
    explain(out, inputs=folder)
    before = out.read_bytes()
    (folder / "007.png").unlink()
    for flags, count, first in (((), 1, "007.png"), (("--limit", "8"), 2, "007.png"), (("--limit", "3"), 7, "003.png")):
        done = explain(out, *flags, inputs=folder, code=2)
        assert f"finished rows ({count}, such as '{first}')" in done.err
        assert "another --out" in done.err
        assert "--force" in done.err
        assert done.out == ""
        assert out.read_bytes() == before
        assert not out.with_name("run.h5.part").exists()
    explain(tmp_path / "other.h5", "--limit", "3", inputs=folder)
    assert told(explain(out, "--force", "--limit", "3", inputs=folder).out)["computed"] == 3
    assert told(explain(out, inputs=folder).out)["inputs_added"] == 6


def test_a_limit_on_an_interrupted_run(folder, out, monkeypatch):
    """It may leave out what was not done, and nothing else."""
    interrupted(monkeypatch, out, folder)  # six of ten rows
    message = explain(out, "--limit", "5", inputs=folder, code=2).err
    assert f"{out}.part: this would drop finished rows (1, such as '005.png')" in message
    counts = told(explain(out, "--limit", "7", inputs=folder).out)
    assert (counts["rows"], counts["kept"], counts["computed"], counts["inputs_removed"]) == (7, 6, 1, 3)
    assert told(explain(out, inputs=folder).out)["kept"] == 7


def test_an_unchanged_image_is_not_decoded_again(folder, out, tmp_path, monkeypatch):
    from attrcli import data

    explain(out, "--batch-size", "4", inputs=folder)
    images(tmp_path / "new", 10, seed=1)
    shutil.copy(tmp_path / "new/005.png", folder / "005.png")
    read, decoded = data.read, []

    def counted(record, *given, **named):
        decoded.append(record.id)
        return read(record, *given, **named)

    monkeypatch.setattr(data, "read", counted)
    assert told(explain(out, inputs=folder).out)["computed"] == 1
    assert decoded == ["004.png", "005.png", "006.png", "007.png"]  # the batch of the changed one
    decoded.clear()
    (folder / "009.png").write_bytes(b"no image")
    assert told(explain(out, inputs=folder, code=3).out)["errors"] == 1
    assert decoded == ["008.png", "009.png"]


def test_a_message_is_told_in_full_and_stored_in_short(folder, out):
    name = "a" * 190 + ".png"
    (folder / name).write_bytes(b"no image")
    done = explain(out, inputs=folder, code=3)
    told_, stored = done.err.strip(), rows(out)["message"][-1]
    assert name in told_
    assert "not an image that can be read; accepted: PNG" in told_
    assert stored.endswith("…")
    assert len(stored.encode()) == 200
    assert stored[:-1] in told_


def test_errors_are_tried_again(folder, out):
    kept = (folder / "004.png").read_bytes()
    (folder / "004.png").write_bytes(b"no image")
    explain(out, inputs=folder, code=3)
    assert told(explain(out, inputs=folder, code=3).out)["kept"] == 9
    (folder / "004.png").write_bytes(kept)
    counts = told(explain(out, inputs=folder).out)
    assert (counts["computed"], counts["errors"]) == (1, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("-m", "saliency"), ["method is", "smoothgrad", "saliency"]),
        (("-o", "samples=8"), ["options.samples is 4, asked for 8"]),
        (("-t", "3"), ["target is", "predicted"]),
        (("--score", "prob"), ["score is", "prob"]),
        (("--seed", "1"), ["seed is 0, asked for 1"]),
        (("-p", "unit"), ["preprocess.input.mean", "0.286"]),
        (("--precision", "float64"), ["precision is", "float64"]),
    ],
)
def test_another_configuration_is_refused_naming_what_differs(folder, out, change, words):
    common = ["explain", MLP, folder, "-m", "smoothgrad", "-o", "samples=4", "--out", out]
    if change == ("-m", "saliency"):
        other = ["explain", MLP, folder, "--out", out, *change]
    else:
        other = [*common, *change]
    assert attrcli(*common).code == 0
    before = out.read_bytes()
    done = attrcli(*other)
    assert done.code == 2
    assert all(word in done.err for word in [*words, str(out), "--force"]), done.err
    assert out.read_bytes() == before
    assert told(attrcli(*other, "--force").out)["computed"] == 10


def test_another_model_is_refused_and_a_renamed_one_is_not(folder, out, tmp_path):
    explain(out, inputs=folder)
    done = explain(out, inputs=folder, model=CNN, code=2)
    assert "model_sha256" in done.err
    model = tmp_path / "renamed.onnx"
    model.write_bytes(MLP.read_bytes())
    (tmp_path / "renamed.toml").write_text((SAMPLES / "fashion_mlp.toml").read_text())
    shutil.copy(SAMPLES / "labels.txt", tmp_path)
    assert told(explain(out, inputs=folder, model=model).out)["computed"] == 0


def test_the_recorded_batch_size_is_used_again(folder, out):
    explain(out, "--batch-size", "3", inputs=folder)
    images(folder, 12)
    explain(out, inputs=folder)
    assert rows(out)["attributes"]["batch_size"] == 3
    explain(out, "--force", inputs=folder)
    assert rows(out)["attributes"]["batch_size"] > 3


def interrupted(monkeypatch, out, folder):
    """A run of batches of three that stops before the third; what it printed."""
    from attrcli import explain as verb

    compute, calls = verb.compute, []

    def stopping(plan, batch):
        calls.append(batch.rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(plan, batch)

    monkeypatch.setattr(verb, "compute", stopping)
    done = explain(out, "--batch-size", "3", inputs=folder, code=130)
    monkeypatch.undo()
    return done


def test_an_interrupted_run_goes_on(folder, out, tmp_path, monkeypatch):
    """Whatever stops it: the rows that were written stay, and the end is the same."""
    done = interrupted(monkeypatch, out, folder)
    assert f"{out}.part" in done.err
    assert "the same command goes on" in done.err
    with RunFile(f"{out}.part") as part:
        assert part.status.tolist() == [1] * 6 + [0] * 4
        assert not part.complete
    shown = attrcli("inspect", f"{out}.part").out
    assert "complete:     False" in shown
    assert "rows_ok:      6" in shown
    assert "rows_todo:    4" in shown
    for command in (["inspect"], ["render", "--out", tmp_path / "p"], ["export", tmp_path / "e", "--to", "npz"]):
        done = attrcli(command[0], out, *command[1:])
        assert (done.code, done.out) == (2, "")
        assert f"{out}: no such file; its run is not finished: see {out}.part" in done.err
    counts = told(explain(out, inputs=folder).out)
    assert (counts["computed"], counts["kept"]) == (4, 6)
    explain(tmp_path / "whole.h5", "--batch-size", "3", inputs=folder)
    assert_same_rows(out, tmp_path / "whole.h5")
    assert not out.with_name("run.h5.part").exists()


# -- the disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_line_and_keeps_the_earlier_rows(folder, out):
    explain(out, "--limit", "5", inputs=folder)
    before = out.read_bytes()
    command = [*RUN, "explain", str(MLP), str(folder), "-m", "saliency", "--out", str(out)]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "MB needed" in done.stderr
    assert done.stdout == ""
    assert out.read_bytes() == before
    assert told(explain(out, inputs=folder).out)["kept"] == 5


def test_a_disk_that_fills_up_during_the_run(folder, out, monkeypatch):
    from attrcli.store import RunWriter

    write, calls = RunWriter.write, []

    def full(self, *given, **named):
        calls.append(1)
        if len(calls) == 3:
            raise UsageError("no space left on device")
        write(self, *given, **named)

    monkeypatch.setattr(RunWriter, "write", full)
    assert "no space left" in explain(out, "--batch-size", "2", inputs=folder, code=2).err
    monkeypatch.undo()
    assert told(explain(out, inputs=folder).out)["kept"] == 4


# -- kill ----------------------------------------------------------------------------------------------------------

SLOW = ["-m", "smoothgrad", "-o", "samples=30", "--batch-size", "4", "--threads", "1", "-q"]


def started(out, count):
    return subprocess.Popen(
        [*RUN, "explain", str(CNN), str(TRAIN), *SLOW, "--limit", str(count), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def written(path):
    """How many rows of a run in progress are good; 0 while there is none."""
    try:
        with RunFile(path) as part:
            return int((part.status == Status.OK).sum())
    except UsageError:
        return 0


def kill_and_resume(folder, count, kills, seed):
    """Kill a run of some images at random moments after the first row; resume; start over; until `kills` are done."""
    whole = undisturbed(folder / "whole.h5", count)
    generator, done, out = random.Random(seed), 0, folder / "run.h5"
    while done < kills:
        with started(out, count) as child:
            before = written(f"{out}.part")
            while child.poll() is None and written(f"{out}.part") <= before:
                time.sleep(0.01)
            if child.poll() is None:
                time.sleep(generator.uniform(0, 1.2))
                child.kill()
            child.communicate()
        if child.returncode == 0:  # it was done before it could be killed
            assert_same_rows(out, whole)
            out.unlink()
            continue
        assert child.returncode == -signal.SIGKILL
        done += 1
        assert out.exists() or written(f"{out}.part") > before
    with started(out, count) as child:
        stdout, stderr = child.communicate()
    assert child.returncode == 0, stderr
    assert told(stdout.decode())["rows"] == count
    assert_same_rows(out, whole)
    assert rows(out)["attributes"]["complete"]
    assert [path.name for path in folder.glob("run.h5*") if not path.name.endswith(".lock")] == ["run.h5"]


def undisturbed(out, count):
    """The run that is never killed, in a process of its own like the others."""
    with started(out, count) as child:
        _, stderr = child.communicate()
    assert child.returncode == 0, stderr
    assert (rows(out)["status"] == Status.OK).all()
    return out


def test_kill_9_twice(tmp_path):
    kill_and_resume(tmp_path, 48, 2, seed=0)


@pytest.mark.slow
def test_kill_9_thirty_times(tmp_path):
    kill_and_resume(tmp_path, 240, 30, seed=1)


# -- memory --------------------------------------------------------------------------------------------------------

PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak(*command):
    """Peak resident memory of a command, in KB."""
    run = [sys.executable, "-c", PEAK, *map(str, command)]
    return int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fashion_cnn.onnx", "fashion_cnn.pt"])
def test_memory_does_not_grow_with_the_number_of_inputs(tmp_path, model):
    files = sorted(TRAIN.rglob("*.png")) + sorted(TEST.rglob("*.png"))
    for number in range(2000):
        link = tmp_path / "in" / f"{number // 200}" / f"{number:04d}.png"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(files[number % len(files)])
    peaks = {}
    for count in (200, 2000):
        out = tmp_path / f"{count}.h5"
        command = [*RUN, "explain", SAMPLES / model, tmp_path / "in", "-m", "integrated_gradients", "-o", "steps=4"]
        peaks[count] = peak(*command, "--limit", count, "--out", out)
        assert len(rows(out)["status"]) == count
    assert peaks[2000] <= 1.1 * peaks[200], peaks


def test_a_link_as_out_stays_a_link(folder, tmp_path):
    real, link = tmp_path / "real.h5", tmp_path / "link.h5"
    explain(real, inputs=folder)
    link.symlink_to(real)
    explain(link, "--force", "-t", "0", inputs=folder)
    assert link.is_symlink()
    assert (rows(real)["target"][rows(real)["status"] == 1] == 0).all()


def test_a_sidecar_that_changed_is_another_configuration(folder, out, tmp_path):
    sidecar = tmp_path / "side.toml"
    sidecar.write_text(SIDECAR)
    explain(out, "-p", sidecar, inputs=folder)
    sidecar.write_text(SIDECAR.replace("0.3530", "0.5"))
    assert "preprocess.input.std" in explain(out, "-p", sidecar, inputs=folder, code=2).err
    assert np.isfinite(rows(out)["attribution"]).all()
