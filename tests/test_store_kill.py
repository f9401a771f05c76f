import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
from store_runs import (
    assert_same,
    fill,
    finish,
    leftovers,
    make,
    names,
    open_run,
    part_of,
)

from attrcli.errors import UsageError
from attrcli.store import RunFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


# The disk ------------------------------------------------------------------------------------------------------------


def refuse(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


def test_a_full_disk_shows_before_the_first_row(path, monkeypatch):
    make(path, names(10))
    before = path.read_bytes()
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with open_run(path, names(20)) as writer, pytest.raises(UsageError, match=r"no space left.*MB needed.*MB free"):
        writer.prepare()
    assert path.read_bytes() == before
    assert leftovers(path) == []


def test_a_full_disk_while_writing_keeps_the_earlier_rows(path, monkeypatch):
    with open_run(path) as writer:
        fill(writer, limit=1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", refuse(errno.EDQUOT))
            with pytest.raises(UsageError, match="rows already written are kept"):
                fill(writer)
    with open_run(path) as writer:
        assert writer.resumed == 4
    assert finish(path) == 6


def test_a_short_write_is_completed(path, monkeypatch, tmp_path):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: pwrite(file, data[:100], position))
    finish(path)
    monkeypatch.undo()
    assert_same(path, make(tmp_path / "whole.h5", names(10)))


def test_a_full_disk_at_the_end_keeps_the_part(path, monkeypatch, tmp_path):
    with open_run(path) as writer:
        fill(writer)
        monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
        with pytest.raises(UsageError, match=r"run\.h5: no space left.*rows already written are kept"):
            writer.finish()
    monkeypatch.undo()
    assert leftovers(path) == ["run.h5.part"]
    assert finish(path) == 0
    assert_same(path, make(tmp_path / "whole.h5", names(10)))


def test_a_file_size_limit_is_one_clear_line(path):
    code = f"""import sys, resource; sys.path[:0] = {sys.path!r}
import store_runs as s
from attrcli.errors import UsageError
resource.setrlimit(resource.RLIMIT_FSIZE, ({{}}, {resource.RLIM_INFINITY}))
try:
    s.make({str(path)!r}, s.names(200))
except UsageError as error:
    print(error)
"""
    for limit, expected in ((50_000, "file too large"), (10**9, "")):
        done = subprocess.run([sys.executable, "-c", code.format(limit)], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert expected in done.stdout
        assert bool(done.stdout) == bool(expected)
        assert leftovers(path) == []


@pytest.mark.parametrize("where", ["missing/run.h5", "file/run.h5", "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, where):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=f"cannot write .*{where}"):
        open_run(tmp_path / where)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write")
def test_an_unwritable_folder_is_named():
    with pytest.raises(UsageError, match=r"cannot write /proc/self/run\.h5"):
        open_run(Path("/proc/self/run.h5"))


# Kill ----------------------------------------------------------------------------------------------------------------


def kill_and_resume(folder, kills, seed):
    """Runs of 240 rows, each killed and resumed until it is done, until `kills` processes were killed at work."""
    rng = random.Random(seed)
    script = Path(__file__).with_name("store_runs.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    whole = {rows: make(folder / f"whole{rows}.h5", names(rows, 240 - rows)) for rows in (240, 280)}
    done = runs = 0
    while done < kills:
        path = folder / f"run{runs}.h5"
        runs += 1
        for rows in whole:  # the second list takes most rows from the first file, and moves them
            for _ in range(100):
                command = [sys.executable, script, path, str(rows), "0.004", str(240 - rows)]
                with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
                    child.stdout.readline()  # open
                    if rng.random() < 0.7:
                        child.stdout.readline()  # the first row is written
                    if done < kills:
                        time.sleep(rng.uniform(0, 0.35))
                        child.kill()
                    child.stdout.read()
                if child.returncode == 0:
                    break
                assert child.returncode == -9
                done += 1
            assert_same(path, whole[rows])
            assert not part_of(path).exists()
    assert leftovers(path) == sorted(item.name for item in {*folder.glob("run*.h5"), *whole.values()} - {path})


def test_killed_runs_end_as_uninterrupted_ones(tmp_path):
    kill_and_resume(tmp_path, 5, seed=0)


def killed_at(step, path, ids):
    """Run in a child that is killed at its `step`-th call that changes a file, in mid-write; True if it ended."""
    child = os.fork()
    if child == 0:
        calls = iter(range(step, -1, -1))
        pwrite = os.pwrite

        def half(file, data, position):
            left = next(calls, 0)
            written = pwrite(file, data if left else data[: len(data) // 2], position)
            return written if left else os.kill(os.getpid(), signal.SIGKILL)

        def before(call):
            return lambda *given, **named: (
                call(*given, **named) if next(calls, 0) else os.kill(os.getpid(), signal.SIGKILL)
            )

        os.pwrite = half
        for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (h5py.File, "close")):
            setattr(module, name, before(getattr(module, name)))
        try:
            finish(path, ids)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == 0


def test_killed_at_every_single_step(path, tmp_path):
    (tmp_path / "whole").mkdir()
    ids = names(12, shift=-4)
    whole = make(tmp_path / "whole" / "run.h5", ids)
    earlier = make(tmp_path / "whole" / "earlier.h5", names(8)).read_bytes()
    step = 0
    ended = False
    while not ended:
        path.write_bytes(earlier)
        ended = killed_at(step, path, ids)
        step += 1
        with RunFile(path) as run:  # at no moment without a readable finished file
            assert run.complete
        finish(path, ids)
        assert_same(path, whole)
        assert leftovers(path) == ["whole"]
    assert step >= 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_runs_end_as_uninterrupted_ones_thirty_times(tmp_path, seed):
    kill_and_resume(tmp_path, 30, seed)
