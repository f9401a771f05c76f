"""Sequences from file to run file: the bundled splice-site nets, layouts, lengths, strands, and what is refused."""

import json
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from cli_runs import SAMPLES, TEST, assert_same_rows, attrcli, explain, refused, rows, scripted
from torch import nn

from attrcli import letters
from attrcli.baselines import resolve
from attrcli.store import RunFile

DONOR, ACCEPTOR = SAMPLES / "splice_donor.onnx", SAMPLES / "splice_acceptor.onnx"
DONORS, ACCEPTORS, CONTROLS = (SAMPLES / f"sequences/{name}.fasta" for name in ("donor", "acceptor", "controls"))
EXACT = {"rtol": 0, "atol": 2e-6}


class Net(nn.Module):
    """A small net with a convolution; `layout` says how it takes a sequence of 12 letters."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last: bool = layout.startswith("NLC")
        self.flat: bool = layout.endswith("flat")
        self.convolution = nn.Conv1d(4, 8, 5)
        self.dense = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.flat:
            x = x.reshape(-1, 12, 4) if self.last else x.reshape(-1, 4, 12)
        if self.last:
            x = x.transpose(1, 2)
        return self.dense(torch.relu(self.convolution(x)).flatten(1))


class BothStrands(nn.Module):
    """The mean of a net's answers for a sequence and its reverse complement."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net("NCL")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.net(x) + self.net(x.flip(1).flip(2))) / 2


def model(path, layout="NCL", module=None, **keys):
    """The net as TorchScript, with its sidecar inside."""
    order, _, flat = layout.partition(" ")
    told = {"kind": "sequence", "alphabet": "ACGT", "size": [12], "layout": order, "flat": bool(flat)} | keys
    lines = [f"{key} = {json.dumps(value)}" for key, value in told.items() if value is not None]
    return scripted(path, module or Net(layout), "[input]\n" + "\n".join(lines))


def fasta(path, *sequences):
    path.write_text("".join(f">s{number}\n{text}\n" for number, text in enumerate(sequences)))
    return path


SEQUENCES = ("ACGTTGCAAGCT", "GGATTACAGATT", "ACGNTGCAAGNN", "acgttgcaAGCT")


@pytest.fixture
def some(tmp_path):
    return fasta(tmp_path / "some.fa", *SEQUENCES)


# --- the bundled nets


@pytest.mark.parametrize(("net", "inputs", "site"), [(DONOR, DONORS, {5, 6}), (ACCEPTOR, ACCEPTORS, {48, 49})])
def test_the_largest_contributions_are_those_of_the_site(tmp_path, net, inputs, site):
    done = explain(tmp_path / "r.h5", "--target", "1", model=net, inputs=inputs, method="deeplift")
    assert float(done.out.split("gap_max:")[1].split()[0]) < 1e-6
    found = rows(tmp_path / "r.h5")
    assert (found["prediction"] > 0.5).mean() > 0.8
    mean = found["attribution"].sum(1).mean(0)
    assert set(np.argsort(mean)[-2:].tolist()) == site


def test_the_nets_tell_sites_from_others(tmp_path):
    explain(tmp_path / "r.h5", model=ACCEPTOR, inputs=CONTROLS)
    assert np.median(rows(tmp_path / "r.h5")["prediction"]) < 0.1


def test_the_three_formats_say_the_same(tmp_path):
    for suffix in (".onnx", ".pt", ".pt2"):
        net = ACCEPTOR.with_suffix(suffix)
        explain(tmp_path / f"r{suffix}.h5", model=net, inputs=ACCEPTORS, method="deeplift")
    for suffix in (".pt", ".pt2"):
        assert_same_rows(tmp_path / "r.onnx.h5", tmp_path / f"r{suffix}.h5", rtol=0, atol=1e-5)


# --- the run file


def test_what_a_run_file_holds(tmp_path):
    explain(tmp_path / "r.h5", model=DONOR, inputs=DONORS, method="deeplift")
    with h5py.File(tmp_path / "r.h5") as file:
        assert file["attribution"].shape == file["hypothetical"].shape == (20, 4, 18)
        assert [dim.label for dim in file["hypothetical"].dims] == ["sample", "letter", "position"]
        assert file["sample_id"][0] == b"donor.fasta#donor_00"
        assert json.loads(file.attrs["baseline"]) == {"name": "shuffle", "count": 20}
        told = json.loads(file.attrs["preprocess"])["input"]
    assert told == {
        "kind": "sequence", "alphabet": "ACGT", "size": [18], "unknown": "zero", "layout": "NLC",
    }  # fmt: skip
    explain(tmp_path / "s.h5", model=DONOR, inputs=DONORS, method="saliency")
    assert "hypothetical" not in rows(tmp_path / "s.h5")


def test_the_contributions_of_the_letters_that_there_are_add_up(tmp_path):
    explain(tmp_path / "r.h5", "--precision", "float64", model=DONOR, inputs=DONORS, method="deeplift")
    found = rows(tmp_path / "r.h5")
    texts = DONORS.read_text().split()[1::2]
    observed = np.stack([letters.one_hot(np.frombuffer(t.encode(), "S1"), "ACGT", "zero", "accept") for t in texts])
    actual = (found["hypothetical"] * observed).sum(1)
    np.testing.assert_allclose(actual, found["attribution"].sum(1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(actual.sum(1), found["score"] - found["baseline_score"], rtol=0, atol=1e-12)


def test_hypothetical_contributions_are_those_of_the_multipliers(tmp_path, some):
    net = model(tmp_path / "net.pt")
    for output in ("contribution", "multiplier"):
        flags = ["-b", "background", "-t", "1", "-o", f"output={output}", "--precision", "float64"]
        explain(tmp_path / f"{output}.h5", *flags, model=net, inputs=some, method="deeplift")
    multipliers = rows(tmp_path / "multiplier.h5")["attribution"]
    background = np.array([0.3, 0.2, 0.2, 0.3])
    expected = multipliers - np.einsum("c,ncp->np", background, multipliers)[:, None]
    np.testing.assert_allclose(rows(tmp_path / "contribution.h5")["hypothetical"], expected, rtol=0, atol=1e-7)


def test_shuffles_are_a_set_over_which_all_is_a_mean(tmp_path):
    one = fasta(tmp_path / "one.fa", SEQUENCES[0])
    net = model(tmp_path / "net.pt")
    raw = letters.one_hot(np.frombuffer(SEQUENCES[0].encode(), "S1"), "ACGT", "uniform", "accept")
    baseline = resolve("shuffle:5", "sequence", load=None, alphabet="ACGT")
    drawn = [letters.text_of(each, "ACGT") for each in baseline(raw, "one.fa#s0", 7)]
    explain(tmp_path / "a.h5", "-b", "shuffle:5", "--seed", "7", model=net, inputs=one, method="deeplift")
    listed = fasta(tmp_path / "drawn.fasta", *drawn)
    explain(tmp_path / "b.h5", "-b", listed, model=net, inputs=one, method="deeplift")
    assert_same_rows(tmp_path / "a.h5", tmp_path / "b.h5", **EXACT)


def test_batches_seeds_and_resuming(tmp_path):
    options = {"model": ACCEPTOR, "inputs": ACCEPTORS, "method": "deeplift"}
    explain(tmp_path / "whole.h5", "--batch-size", "4", **options)
    explain(tmp_path / "one.h5", "--batch-size", "1", **options)
    assert_same_rows(tmp_path / "whole.h5", tmp_path / "one.h5", rtol=0, atol=1e-5)
    explain(tmp_path / "parts.h5", "--batch-size", "4", "--limit", "8", **options)
    done = explain(tmp_path / "parts.h5", "--batch-size", "4", **options)
    assert re.search(r"computed: +12\n", done.out)
    assert_same_rows(tmp_path / "whole.h5", tmp_path / "parts.h5")
    explain(tmp_path / "seed.h5", "--batch-size", "4", "--seed", "1", **options)
    assert np.abs(rows(tmp_path / "seed.h5")["attribution"] - rows(tmp_path / "whole.h5")["attribution"]).max() > 1e-3
    for flags in (["-b", "shuffle:5"], ["--reverse-complement"], ["--length", "53"]):
        done = explain(tmp_path / "whole.h5", "--batch-size", "4", *flags, code=2, **options)
        assert "asked for" in done.err


def test_a_changed_record_is_computed_again(tmp_path, some):
    net = model(tmp_path / "net.pt")
    explain(tmp_path / "r.h5", model=net, inputs=some, method="deeplift")
    before = rows(tmp_path / "r.h5")["attribution"]
    fasta(some, SEQUENCES[0], "TTATTACAGATT", *SEQUENCES[2:])
    assert "computed:   1\n" in explain(tmp_path / "r.h5", model=net, inputs=some, method="deeplift").out
    changed = (rows(tmp_path / "r.h5")["attribution"] != before).any(axis=(1, 2))
    np.testing.assert_array_equal(changed, [False, True, False, False])


# --- layouts and letters


@pytest.mark.parametrize("layout", ["NLC", "NLC flat", "NCL flat"])
def test_all_layouts_give_the_same(tmp_path, some, layout):
    for name, net in (("a", model(tmp_path / "a.pt")), ("b", model(tmp_path / "b.pt", layout))):
        explain(tmp_path / f"{name}.h5", model=net, inputs=some, method="deeplift")
    assert_same_rows(tmp_path / "a.h5", tmp_path / "b.h5", **EXACT)


@pytest.mark.parametrize("layout", ["NCL", "NLC", "NLC flat"])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
def test_arrays_of_one_hot_columns_give_what_fasta_gives(tmp_path, some, layout, suffix):
    net = model(tmp_path / "net.pt", layout)
    explain(tmp_path / "fasta.h5", "-b", "zero", model=net, inputs=some, method="deeplift")
    raw = np.stack([letters.one_hot(np.frombuffer(t.encode(), "S1"), "ACGT", "uniform", "accept") for t in SEQUENCES])
    raw = raw.transpose(0, 2, 1) if layout.startswith("NLC") else raw
    raw = raw.reshape(4, -1) if "flat" in layout else raw
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, raw)
    elif suffix == ".npz":
        np.savez(path, x=raw)
    else:
        with h5py.File(path, "w") as file:
            file["x"] = raw
    explain(tmp_path / "array.h5", "-b", "zero", model=net, inputs=path, method="deeplift")
    np.testing.assert_array_equal(
        rows(tmp_path / "array.h5")["attribution"], rows(tmp_path / "fasta.h5")["attribution"]
    )


def test_lower_case_counts_as_capitals(tmp_path, some):
    explain(tmp_path / "r.h5", "-b", "zero", model=model(tmp_path / "net.pt"), inputs=some, method="deeplift")
    found = rows(tmp_path / "r.h5")["attribution"]
    np.testing.assert_allclose(found[3], found[0], **EXACT)


@pytest.mark.parametrize(
    ("keys", "failed"), [({"unknown": "refuse"}, ["some.fa#s2"]), ({"lowercase": "refuse"}, ["some.fa#s3"])]
)
def test_letters_that_the_sidecar_refuses_fail_alone(tmp_path, some, keys, failed):
    done = explain(tmp_path / "r.h5", model=model(tmp_path / "net.pt", **keys), inputs=some, code=3)
    found = rows(tmp_path / "r.h5")
    assert [name for name, status in zip(found["sample_id"], found["status"], strict=True) if status == 2] == failed
    assert f"{failed[0]!r}: the letter" in done.err or f"{failed[0]}: the letter" in done.err


def test_a_bad_record_fails_alone(tmp_path):
    bad = tmp_path / "bad.fa"
    bad.write_text(f">good\n{SEQUENCES[0]}\n>empty\n>digits\nACGT1\n")
    explain(tmp_path / "r.h5", model=model(tmp_path / "net.pt"), inputs=bad, code=3)
    found = rows(tmp_path / "r.h5")
    assert found["status"].tolist() == [1, 2, 2]
    assert ["holds no letters" in found["message"][1], "holds '1'" in found["message"][2]] == [True, True]


# --- lengths


def test_another_length_is_exit_2_unless_asked_for(tmp_path):
    uneven = fasta(tmp_path / "uneven.fa", "ACGTTGCAAGCT", "ACGTTGCAAGCTA", "CGT")
    net = model(tmp_path / "net.pt")
    told = refused(tmp_path / "r.h5", model=net, inputs=uneven)
    assert "'uneven.fa#s1' has 13 letters, the model takes 12: --length 12" in told
    explain(tmp_path / "flag.h5", "--length", "12", model=net, inputs=uneven, method="deeplift")
    fitted = model(tmp_path / "fit.pt", lengths="fit")
    explain(tmp_path / "key.h5", model=fitted, inputs=uneven, method="deeplift")
    assert_same_rows(tmp_path / "flag.h5", tmp_path / "key.h5")
    even = fasta(tmp_path / "even.fa", "ACGTTGCAAGCT", "ACGTTGCAAGCT")
    explain(tmp_path / "even.h5", "-b", "zero", model=net, inputs=even, method="deeplift")
    explain(tmp_path / "zero.h5", "-b", "zero", "--length", "12", model=net, inputs=uneven, method="deeplift")
    short = rows(tmp_path / "zero.h5")["attribution"]
    np.testing.assert_allclose(short[1], rows(tmp_path / "even.h5")["attribution"][1], **EXACT)
    assert not short[2][:, [0, 1, 2, 3, 7, 8, 9, 10, 11]].any()  # padding is what zero is: four before, five behind
    assert short[2][:, 4:7].any()


def test_without_a_size_the_first_record_says_the_length(tmp_path, some):
    net = model(tmp_path / "net.pt", size=None)
    explain(tmp_path / "r.h5", model=net, inputs=some)
    assert rows(tmp_path / "r.h5")["attribution"].shape == (4, 4, 12)
    told = refused(tmp_path / "q.h5", model=net, inputs=fasta(tmp_path / "u.fa", SEQUENCES[0], "ACG"))
    assert "'u.fa#s1' has 3 letters" in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('layout = "NLC"', 'layout = "NCL"'), "the model takes 18x4, and would be given 4x18"),
        (("size = [18]", "size = [20]"), "would be given 20x4"),
        (('alphabet = "ACGT"', 'alphabet = "ACGTN"'), "would be given 18x5"),
        (('layout = "NLC"', 'layout = "NLC"\nflat = true'), "would be given 72"),
        (("size = [18]", 'lengths = "fit"'), None),
    ],
)
def test_a_sidecar_that_does_not_fit_the_file(tmp_path, change, words):
    net = tmp_path / "net.onnx"
    shutil.copy(DONOR, net)
    net.with_suffix(".toml").write_text(DONOR.with_suffix(".toml").read_text().replace(*change))
    if words is None:
        explain(tmp_path / "r.h5", model=net, inputs=CONTROLS)
    else:
        assert words in refused(tmp_path / "r.h5", model=net, inputs=DONORS)


def test_lengths_fit_needs_a_length(tmp_path, some):
    net = model(tmp_path / "net.pt", size=None, lengths="fit")
    assert "lengths = 'fit' needs a length" in refused(tmp_path / "r.h5", model=net, inputs=some)


# --- both strands


@pytest.mark.parametrize("method", ["deeplift", "gradient", "integrated_gradients", "occlusion"])
def test_both_strands_are_the_mean_of_the_model_on_both(tmp_path, some, method):
    flags = ["-b", "background", "-t", "1"] if method != "gradient" else ["-t", "1"]
    both = model(tmp_path / "both.pt", module=BothStrands())
    flag = [*flags, "--reverse-complement", "--precision", "float64"]
    explain(tmp_path / "flag.h5", *flag, model=model(tmp_path / "net.pt"), inputs=some, method=method)
    explain(tmp_path / "mean.h5", *flags, "--precision", "float64", model=both, inputs=some, method=method)
    assert_same_rows(tmp_path / "flag.h5", tmp_path / "mean.h5", rtol=0, atol=1e-7)


def test_both_strands_are_complete_and_choose_one_target(tmp_path):
    options = {"model": ACCEPTOR, "inputs": ACCEPTORS, "method": "deeplift"}
    explain(tmp_path / "r.h5", "--reverse-complement", "--overlays", tmp_path / "o", **options)
    with RunFile(tmp_path / "r.h5") as run:
        assert np.nanmax(run.gaps()) < 1e-6
    found = rows(tmp_path / "r.h5")
    assert np.isfinite(found["hypothetical"]).all()
    assert set(found["target"].tolist()) <= {0, 1}
    assert len(list((tmp_path / "o").iterdir())) == 20


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reverse-complement"], "--reverse-complement: only DNA and RNA have one, and the inputs are of kind image"),
        (["--length", "5"], "--length 5: only for sequences, and the inputs are of kind image"),
        (["--length", "0"], "--length 0: a whole number of at least 1"),
    ],
)
def test_images_have_neither_strands_nor_length(tmp_path, flags, words):
    assert words in refused(tmp_path / "r.h5", *flags)


def test_strands_of_rna_are_those_of_the_same_dna(tmp_path, some):
    """The same net and letters, U for T."""
    (tmp_path / "rna.fa").write_text(some.read_text().replace("T", "U").replace("t", "u"))
    for name, alphabet, inputs in (("dna", "ACGT", some), ("rna", "ACGU", tmp_path / "rna.fa")):
        net = model(tmp_path / f"{name}.pt", alphabet=alphabet)
        out = tmp_path / f"{name}.h5"
        explain(out, "--reverse-complement", "-b", "zero", "-t", "1", model=net, inputs=inputs, method="deeplift")
    dna, rna = (rows(tmp_path / f"{name}.h5") for name in ("dna", "rna"))
    assert np.abs(dna["attribution"]).max() > 0
    for name in ("attribution", "score", "hypothetical"):
        np.testing.assert_array_equal(dna[name], rna[name])


def test_strands_are_of_dna_or_rna_and_of_the_input(tmp_path, some):
    other = model(tmp_path / "other.pt", alphabet="ACGN")
    told = refused(tmp_path / "r.h5", "--reverse-complement", model=other, inputs=some)
    assert "the alphabet ACGN has no complement" in told
    nodes = json.loads(attrcli("inspect", DONOR, "--json").out)["nodes"]
    told = refused(tmp_path / "r.h5", "--reverse-complement", "--at", nodes[2], model=DONOR, inputs=DONORS)
    assert "has no other strand; leave out that, or --at" in told


def test_a_node_inside_has_no_letters(tmp_path):
    nodes = json.loads(attrcli("inspect", DONOR, "--json").out)["nodes"]
    explain(tmp_path / "r.h5", "--at", nodes[1], "-b", "shuffle:2", model=DONOR, inputs=DONORS, method="deeplift")
    found = rows(tmp_path / "r.h5")
    assert "hypothetical" not in found
    assert np.abs(found["completeness_delta"]).max() < 1e-4


# --- without a sidecar


def test_fasta_without_a_sidecar_says_what_to_write(tmp_path):
    net = tmp_path / "net.onnx"
    shutil.copy(DONOR, net)
    told = refused(tmp_path / "r.h5", model=net, inputs=DONORS)
    for words in ("the order of the letters cannot be guessed", "alphabet = 'ACGT'", "--write-sidecar", "net.toml"):
        assert words in told
    assert attrcli("inspect", net, "--write-sidecar").code == 0
    explain(tmp_path / "r.h5", model=net, inputs=DONORS, method="deeplift")
    explain(tmp_path / "s.h5", model=DONOR, inputs=DONORS, method="deeplift")
    assert_same_rows(tmp_path / "r.h5", tmp_path / "s.h5")


@pytest.mark.parametrize(("net", "layout", "size"), [(DONOR, "NLC", 18), (ACCEPTOR, "NCL", 53)])
def test_the_proposed_sidecar(tmp_path, net, layout, size):
    copy = tmp_path / "net.onnx"
    shutil.copy(net, copy)
    attrcli("inspect", copy, "--write-sidecar")
    text = copy.with_suffix(".toml").read_text()
    for line in ('kind = "sequence"', 'alphabet = "ACGT"', f"size = [{size}]", f'layout = "{layout}"', '"sigmoid"'):
        assert line in text
    told = attrcli("inspect", copy).out
    assert "sample_shape:     4x" in told
    assert "deeplift:             works" in told or "works" in told.split("deeplift")[1].splitlines()[0]


# --- pictures and other tools


def test_logos_of_a_run_and_a_grid(tmp_path):
    for method in ("deeplift", "saliency"):
        explain(tmp_path / f"{method}.h5", "--limit", "3", model=DONOR, inputs=DONORS, method=method)
    done = attrcli("render", tmp_path / "deeplift.h5", "--out", tmp_path / "logos", "--panel", "--scale", "run")
    assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "logos").iterdir()) == [
        f"donor.fasta=donor_0{number}.png" for number in range(3)
    ]
    both = [tmp_path / "deeplift.h5", tmp_path / "saliency.h5"]
    assert attrcli("render", *both, "--out", tmp_path / "grid.png").code == 0
    explain(tmp_path / "image.h5", inputs=TEST / "Bag")
    mixed = attrcli("render", both[0], tmp_path / "image.h5", "--out", tmp_path / "no.png")
    assert mixed.code == 2
    assert "a grid shows images, or sequences" in mixed.err


@pytest.mark.parametrize("alphabet", ["ACGT", "TGCA"])
def test_the_export_to_modisco(tmp_path, some, alphabet):
    net = model(tmp_path / "net.pt", alphabet=alphabet, unknown="refuse")
    explain(tmp_path / "r.h5", model=net, inputs=some, method="deeplift", code=3)
    done = attrcli("export", tmp_path / "r.h5", tmp_path / "out", "--to", "modisco")
    assert done.code == 0, done.err
    with np.load(tmp_path / "out/r.ohe.npz") as one, np.load(tmp_path / "out/r.shap.npz") as other:
        ohe, shap = one["arr_0"], other["arr_0"]
    good = [text.upper() for text in SEQUENCES if "N" not in text]
    assert ohe.shape == shap.shape == (3, 4, 12)
    assert [letters.text_of(each, "ACGT") for each in ohe] == good
    assert (tmp_path / "out/r.ids.txt").read_text().split() == ["some.fa#s0", "some.fa#s1", "some.fa#s3"]
    kept = rows(tmp_path / "r.h5")
    contributions = kept["attribution"].sum(1)[kept["status"] == 1]
    np.testing.assert_allclose((ohe * shap).sum(1), contributions, rtol=0, atol=2e-6)
    again = attrcli("export", tmp_path / "r.h5", tmp_path / "out", "--to", "modisco")
    assert (again.code, "already holds" in again.err) == (2, True)


def test_the_export_to_modisco_refused(tmp_path, some):
    explain(tmp_path / "s.h5", model=DONOR, inputs=DONORS, method="saliency")
    done = attrcli("export", tmp_path / "s.h5", tmp_path / "out", "--to", "modisco")
    assert (done.code, "holds no /hypothetical" in done.err) == (2, True)
    rna = model(tmp_path / "rna.pt", alphabet="ACGU")
    explain(tmp_path / "r.h5", model=rna, inputs=some, method="deeplift")
    done = attrcli("export", tmp_path / "r.h5", tmp_path / "out", "--to", "modisco")
    assert (done.code, "the alphabet is ACGU" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()
