"""500 damaged files of each of torch's formats: every one is refused in one line, or read; none crashes or hangs."""

import random
from collections import Counter

import pytest
import torch
from fuzzing import changed_code, changed_description, damaged, ends
from nets import quiet, ready
from zoo import ZOO
from zoo.cells import FIXED, FORMATS, inputs

SEEDS = {
    "torchscript": [
        ("resnet", "scripted"), ("swin", "scripted"), ("llama", "scripted"), ("deeplab", "scripted"),
        ("bert", "scripted"), ("lstm", "scripted_frozen"), ("vit", "traced_frozen"), ("cell_loop", "scripted"),
        ("siamese", "traced"),
    ],
    "pt2": [
        ("resnet", "pt2"), ("vit", "pt2_fixed"), ("lstm", "pt2"), ("llama", "pt2"), ("deeplab", "pt2_decomposed"),
        ("siamese", "pt2"), ("bag", "pt2"),
    ],
}  # fmt: skip
EDITS = {"torchscript": changed_code, "pt2": changed_description}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEDS)
def test_500_damaged_files_are_refused_in_one_line_or_read(kind, tmp_path):
    seeds = []
    for name, how in SEEDS[kind]:
        arch, (suffix, save) = ZOO[name], FORMATS[how]
        path = tmp_path / f"{name}.{suffix}"
        torch.manual_seed(0)
        with quiet():
            save(ready(arch.make(), dtype=torch.float32), inputs(arch, FIXED, torch.float32), path)
        seeds.append((path.read_bytes(), [given.shape for given in arch.inputs.values()]))
    chance, found, wrong = random.Random(0), Counter(), {}
    for i in range(500):
        data, shapes = chance.choice(seeds)
        path = tmp_path / f"{i:03}.{suffix}"
        path.write_bytes(damaged(data, chance, EDITS[kind]))
        end = ends(path, shapes)
        found[end] += 1
        if end not in ("built", "refused"):
            wrong[path.name] = end
        else:
            path.unlink()
    assert not wrong, "\n\n".join(f"{name}: {end}" for name, end in wrong.items())
    assert min(found["built"], found["refused"]) > 20
