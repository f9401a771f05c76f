import fcntl
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_runs import (
    ATTRIBUTES,
    LAYOUT,
    assert_same,
    batch,
    begin,
    fill,
    finish,
    leftovers,
    make,
    names,
    open_run,
    part_of,
    sha,
)

from attrcli.errors import UsageError
from attrcli.store import RunFile, RunWriter, Status, config_of, is_run_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


# Resuming ------------------------------------------------------------------------------------------------------------


def test_a_part_is_continued_and_ends_as_an_uninterrupted_run(path, tmp_path):
    begin(path, batches=2)
    with open_run(path, argv=["other"]) as writer:
        assert writer.resumed == 8
        assert (writer.added, writer.removed) == ([], [])
        assert writer.sha256(7) == sha(names(10)[7])
        assert writer.sha256(8) == ""
        assert fill(writer) == 2
        assert writer.resumed == 8
        assert writer.finish()
    assert_same(path, make(tmp_path / "whole.h5", names(10)))
    with RunFile(path) as run:
        assert run.attributes["argv"] == ["other"]
    assert leftovers(path) == ["whole.h5"]


def test_a_finished_run_with_nothing_to_do_is_not_touched(path):
    make(path, names(10))
    before = path.stat()
    with open_run(path, argv=["again"], versions={"attrcli": "9"}) as writer:
        assert writer.resumed == 10
        assert fill(writer) == 0
        assert not writer.finish()
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino
    assert leftovers(path) == []


def test_a_changed_input_is_seen_by_its_hash_and_replaced(path):
    make(path, names(10))
    with open_run(path) as writer:
        assert writer.sha256(5) == sha(names(10)[5])
        writer.write(slice(4, 8), batch(["new"] * 4))
        assert writer.finish()
    with RunFile(path) as run:
        assert run.read("sample_sha256")[4:8].tolist() == [sha("new")] * 4
        np.testing.assert_array_equal(run.read("attribution")[4:8], batch(["new"] * 4)["attribution"].astype("f4"))
        np.testing.assert_array_equal(run.read("score")[8:], batch(names(10))["score"][8:].astype("f4"))


def test_rows_in_error_are_done_again(path, tmp_path):
    for stop in (RunWriter.finish, RunWriter.close):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        with open_run(path) as writer:
            fill(writer)
            writer.write(slice(4, 8), {}, Status.ERROR, "no such file")
            stop(writer)
        with open_run(path) as writer:
            assert writer.resumed == 6
            assert writer.status.tolist() == [1] * 4 + [0] * 4 + [1] * 2
            assert fill(writer) == 4
            writer.finish()
        assert_same(path, make(tmp_path / "whole.h5", names(10)))


@pytest.mark.parametrize("finished", [True, False])
def test_another_list_keeps_the_good_rows_by_id(path, tmp_path, finished):
    if finished:
        make(path, names(10))
    else:
        begin(path, batches=2)
    good = 10 if finished else 8
    new = [names(10)[7], "first", *names(good), *names(3, shift=20)]
    new = list(dict.fromkeys(new))
    with open_run(path, new) as writer:
        assert writer.added == ["first", *names(3, shift=20)]
        assert writer.removed == names(10)[good:]
        assert writer.resumed == good
        assert [writer.sha256(row) for row in range(3)] == [sha(new[0]), "", sha(new[2])]
        fill(writer, size=1)
        writer.finish()
    assert_same(path, make(tmp_path / "whole.h5", new))


def test_rows_in_error_whose_ids_are_removed_need_no_row_but_a_new_file(path, tmp_path):
    with open_run(path) as writer:
        fill(writer)
        writer.write(slice(7, 10), {}, Status.ERROR, "no such file")
        writer.finish()
    with open_run(path, names(7)) as writer:
        assert writer.removed == names(3, shift=7)
        assert fill(writer) == 0
        assert writer.finish()
    assert_same(path, make(tmp_path / "whole.h5", names(7)))


@pytest.mark.parametrize("finished", [True, False])
def test_finished_rows_are_never_dropped_but_by_force(path, tmp_path, finished):
    if finished:
        make(path, names(10))
    else:
        begin(path, batches=2)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    count, first = 7 if finished else 5, names(10)[3]
    with pytest.raises(UsageError, match=rf"drop finished rows \({count}, such as '{first}'\).*another --out.*--force"):
        open_run(path, names(3) + names(5, shift=20))
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    assert finish(path, names(3), force=True) == 3
    assert_same(path, make(tmp_path / "whole.h5", names(3)))


def test_an_interrupted_run_may_lose_the_ids_that_it_did_not_come_to(path, tmp_path):
    begin(path, batches=2)
    with open_run(path, names(8)) as writer:
        assert (writer.resumed, writer.removed) == (8, names(2, shift=8))
        writer.finish()
    assert_same(path, make(tmp_path / "whole.h5", names(8)))


def test_rows_of_the_part_are_not_dropped_where_the_finished_file_changes(path):
    make(path, names(10))
    begin(path, names(20), batches=2)
    part = part_of(path).read_bytes()
    with open_run(path) as writer, pytest.raises(UsageError, match=r"run\.h5\.part.*drop finished rows \(6, "):
        writer.write(slice(4, 8), batch(["new"] * 4))
    assert part_of(path).read_bytes() == part


def test_a_list_that_grows_twice_takes_rows_from_the_finished_file_and_the_part(path, tmp_path):
    make(path, names(10))
    begin(path, names(18), batches=1)
    with RunFile(path) as run:
        assert len(run) == 10
    with open_run(path, names(20)) as writer:
        assert writer.resumed == 12  # a batch of 4 whose first two were there already
        fill(writer)
        writer.finish()
    assert_same(path, make(tmp_path / "whole.h5", names(20)))


def test_going_back_to_the_finished_list_needs_nothing(path):
    make(path, names(10))
    begin(path, names(14), batches=1)
    before = path.stat().st_mtime_ns
    with open_run(path) as writer:
        assert fill(writer) == 0
        assert not writer.finish()
    assert path.stat().st_mtime_ns == before


def test_the_finished_file_stays_until_the_new_one_is_complete(path):
    make(path, names(10))
    begin(path, names(30), batches=2)
    with RunFile(path) as run:
        assert (len(run), run.complete) == (10, True)


def test_other_versions_may_continue_and_are_recorded(path):
    begin(path, batches=1)
    begin(path, batches=1, threads=8, device="cuda")
    with open_run(path) as writer:
        assert writer.resumed == 8
        fill(writer)
        writer.finish()
    with RunFile(path) as run:
        assert run.attributes["threads"] == 2
        assert run.attributes["history"] == [
            {"versions": ATTRIBUTES["versions"], "device": "cuda", "threads": 8, "batch_size": 4}
        ]


def test_peek_tells_the_batch_size_to_keep(path):
    assert RunWriter.peek(path) is None
    make(path, names(10))
    assert RunWriter.peek(path)["batch_size"] == 4
    begin(path, names(12), batch_size=16)
    assert RunWriter.peek(path)["batch_size"] == 16
    part_of(path).write_bytes(b"nothing")
    assert RunWriter.peek(path) is None


# What is refused -----------------------------------------------------------------------------------------------------


def test_config_of_leaves_out_what_does_not_identify_a_run():
    identity = config_of(ATTRIBUTES | {"complete": True, "schema": "attrcli/1", "history": []})
    assert set(ATTRIBUTES) - set(identity) == {"argv", "inputs_root", "versions", "device", "threads", "batch_size"}
    assert set(identity) <= set(ATTRIBUTES)


@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_is_refused_naming_keys_and_values(path, finished):
    if finished:
        make(path, names(10))
    else:
        begin(path)
    options = {"steps": 100, "baseline": {"kind": "black"}, "note": "z" * 100}
    with pytest.raises(UsageError) as caught:
        open_run(path, method="saliency", options=options, layout=replace(LAYOUT, outputs=(6,)))
    message = str(caught.value)
    assert 'method is "gradient", asked for "saliency"' in message
    assert "options.steps is 50, asked for 100" in message
    assert 'options.note is absent, asked for "zzzz' in message
    assert "layout.outputs is [5], asked for [6]" in message
    assert "--force" in message
    assert "seed" not in message
    assert "z" * 61 not in message


def test_values_that_differ_only_far_inside_still_differ(path):
    make(path, names(1), ATTRIBUTES | {"preprocess": "a" * 100 + "b" + "c" * 100})
    with pytest.raises(UsageError, match="preprocess is"):
        open_run(path, names(1), preprocess="a" * 100 + "d" + "c" * 100)


def test_force_starts_over_and_keeps_the_old_file_until_the_end(path, tmp_path):
    make(path, names(10))
    old = path.read_bytes()
    with open_run(path, force=True, method="saliency") as writer:
        assert writer.resumed == 0
        fill(writer, limit=2)
        assert path.read_bytes() == old
    # The forced run can be continued, although the finished file is of another configuration.
    with open_run(path, method="saliency") as writer:
        assert writer.resumed == 8
    with open_run(path, names(12), method="saliency") as writer:
        assert writer.resumed == 8
        fill(writer, limit=1)
    with open_run(path, names(12), method="saliency") as writer:
        fill(writer)
        writer.finish()
    assert_same(path, make(tmp_path / "whole.h5", names(12), ATTRIBUTES | {"method": "saliency"}))


def test_force_disregards_a_part(path):
    begin(path, batches=2)
    with open_run(path, force=True) as writer:
        assert writer.resumed == 0
        assert fill(writer) == 10


def foreign_hdf5(path):
    with h5py.File(path, "w") as file:
        file["attribution"] = np.zeros(3)


def newer_schema(path):
    make(path, names(2))
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = "attrcli/2"


def lacks_a_dataset(path):
    make(path, names(2))
    with h5py.File(path, "r+") as file:
        del file["label"]


def has_a_group_for_a_dataset(path):
    lacks_a_dataset(path)
    with h5py.File(path, "r+") as file:
        file.create_group("label")


def cut_short(path):
    make(path, names(2))
    path.write_bytes(path.read_bytes()[:100])


def plain_text(path):
    path.write_text("results of last year\n")


@pytest.mark.parametrize("spoil", [foreign_hdf5, plain_text, Path.mkdir])
@pytest.mark.parametrize("force", [False, True])
def test_a_file_of_others_is_never_replaced(path, spoil, force):
    for target in (path, part_of(path)):
        spoil(target)
        before = None if target.is_dir() else target.read_bytes()
        with pytest.raises(UsageError, match=f"cannot write {target}") as caught:
            open_run(path, force=force)
        assert "--force" not in str(caught.value)
        assert before is None or target.read_bytes() == before
        assert leftovers(target) == []
        target.rmdir() if before is None else target.unlink()


@pytest.mark.parametrize("spoil", [newer_schema, lacks_a_dataset, has_a_group_for_a_dataset, cut_short, Path.touch])
@pytest.mark.parametrize("suffix", ["", ".part"])
def test_a_run_file_that_cannot_go_on_is_left_alone_without_force(path, spoil, suffix):
    target = Path(f"{path}{suffix}")
    spoil(target)
    before = target.read_bytes()
    with pytest.raises(UsageError, match="--force"):
        open_run(path)
    assert target.read_bytes() == before
    assert leftovers(target) == []
    assert finish(path, force=True) == 10


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99])
def test_a_part_cut_short_is_refused(path, fraction):
    begin(path)
    whole = part_of(path).read_bytes()
    part_of(path).write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(UsageError, match=r"run\.h5\.part.*--force"):
        open_run(path)
    assert finish(path, force=True) == 10


def test_reading_names_what_is_wrong(path, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        RunFile(path)
    with pytest.raises(UsageError, match="no such file"):
        RunFile(tmp_path)
    plain_text(path)
    with pytest.raises(UsageError, match="cannot be read as HDF5"):
        RunFile(path)
    foreign_hdf5(path)
    with pytest.raises(UsageError, match="not a run file: its attribute 'schema' is None"):
        RunFile(path)
    begin(tmp_path / "begun.h5")
    with pytest.raises(UsageError, match=r"begun\.h5: no such file; .*see .*begun\.h5\.part"):
        RunFile(tmp_path / "begun.h5")
    assert is_run_file(tmp_path / "begun.h5")
    assert is_run_file(tmp_path / "begun.h5.part")
    assert not any(map(is_run_file, (path, tmp_path, tmp_path / "none.h5", Path())))
    with pytest.raises(UsageError, match="no such file"):
        RunFile("")


def test_two_writers_of_one_file_exclude_each_other(path):
    with open_run(path) as writer:
        with pytest.raises(UsageError, match="another attrcli is writing"):
            open_run(path)
        fill(writer)
        with pytest.raises(UsageError, match="another attrcli is writing"):
            open_run(path, force=True)
        writer.finish()
    assert finish(path) == 0


def test_a_lock_left_by_a_killed_process_does_not_hold(path):
    code = f"import sys; sys.path[:0] = {sys.path!r}\nimport store_runs, os, signal\n"
    code += (
        f"w = store_runs.RunWriter.open({str(path)!r}, store_runs.names(10), store_runs.LAYOUT, store_runs.ATTRIBUTES)"
    )
    code += "\nos.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert leftovers(path) == ["run.h5.lock"]
    assert finish(path) == 10
    assert leftovers(path) == []


def test_a_lock_deleted_by_its_holder_is_taken_anew(path, monkeypatch):
    flock, calls = fcntl.flock, []

    def slow(descriptor, how):
        if not calls:
            Path(f"{path}.lock").unlink()  # the former holder released it between our open and our lock
        calls.append(how)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with open_run(path):
        assert len(calls) == 2
        with pytest.raises(UsageError, match="another attrcli"):
            open_run(path)
