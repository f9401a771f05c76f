"""Inputs on their way to the device."""

import h5py
import numpy as np
import pytest
import torch
from cli_runs import CNN, SAMPLES, TEST

from attrcli.batch import send
from attrcli.explain import Config, Plan, explain
from attrcli.samples import Sample
from attrcli.sending import Sent


def test_arrays_arrive_in_the_type_of_the_model():
    arrays = [np.arange(6).reshape(2, 3), np.ones((2, 3), np.int32)]
    arrived = Sent(arrays, torch.float64, torch.device("cpu")).arrived()
    assert (arrived.dtype, arrived.tolist()) == (torch.float64, [array.tolist() for array in arrays])


def test_what_has_another_shape_is_sent_as_a_copy_of_what_fits(tmp_path):
    plan = Plan(Config(str(SAMPLES / "fashion_mlp.pt"), (str(TEST / "Bag"),), "gradient", str(tmp_path / "r.h5")))
    good = plan.read(plan.records[0])
    bad = Sample(good.raw, np.empty(0), "", "it cannot be read")
    arrived = send(plan, [bad, good, bad]).arrived()
    assert torch.equal(arrived, torch.from_numpy(good.x).expand(3, *good.x.shape))
    assert send(plan, [bad]).arrived().shape == (1, *plan.shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["gradient", "deeplift", "occlusion"])
def test_a_gpu_explains_as_the_cpu_does(method, tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        out = str(tmp_path / f"{device}.h5")
        config = Config(str(CNN), (str(TEST),), method, out, device=device, precision="float64", batch_size=7)
        explain(Plan(config))
        with h5py.File(out) as file:
            found.append(file["attribution"][:])
    assert np.abs(found[0] - found[1]).max() < 1e-9 * np.abs(found[0]).max()
