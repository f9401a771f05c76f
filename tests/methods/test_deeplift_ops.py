"""DeepLIFT over the whole op table: each op alone is complete, or refused by name, or integrated and said so."""

import op_cases
import pytest
import torch
from method_nets import target
from test_deeplift import EXACT, gap, opened, points
from torch.nn import functional as F

from attrcli import methods
from attrcli.errors import InputError, UnsupportedOp
from attrcli.graph import ops
from attrcli.graph.ops import OpClass

PLAIN = methods.load("deeplift")
INTEGRATES = methods.load("deeplift", {"fallback": "integrate"})
CASES = op_cases.CASES | op_cases.HALF
SMOOTH_WITHOUT_A_RULE = {
    "polygamma.default",
    "logcumsumexp.default",
    "nansum.default",
    "nanmean.default",
    "renorm.default",
}
KINKED_WITHOUT_A_RULE = {"scatter_reduce.two": 1e-2, "linalg_matrix_norm.default": 1e-2}
REFUSED = {"embedding_bag.padding_idx"}
"""An op whose indices move, and that returns more than one tensor."""


def test_the_cases_are_the_op_table():
    table = {name for names in ops._NAMES.values() for name in names.split()}
    creation = set(ops._NAMES[OpClass.CREATION].split())
    assert table == set(op_cases.CASES) | op_cases.ELSEWHERE | op_cases.MIXES | creation


@pytest.mark.parametrize("name", CASES)
def test_every_op_alone(name, tmp_path):
    model, x, to = opened(CASES[name], tmp_path), points(), target(0, 1, 0)
    unruled = SMOOTH_WITHOUT_A_RULE | set(KINKED_WITHOUT_A_RULE) | REFUSED
    baselines = (points(seed=1), points(seed=1)[:1].expand_as(x), x + 1e-3 * points(seed=2))
    if name in unruled:
        with pytest.raises(UnsupportedOp, match=rf"op aten\.{name.split('.')[0]}.*deeplift has no rule for it"):
            PLAIN.attribute(model, x, to, baselines[0])
    if name in REFUSED:
        with pytest.raises(UnsupportedOp, match="has no rule"):
            INTEGRATES.attribute(model, x, to, baselines[0])
        return
    for method in (INTEGRATES,) if name in unruled else (PLAIN, INTEGRATES):
        for baseline in baselines:
            assert gap(model, x, to, baseline, method) < KINKED_WITHOUT_A_RULE.get(name, EXACT)
        note = method.attribute(model, x, to, baselines[0]).note
        assert all(("integrated numerically: " in text) is (name in unruled) for text in note)


@pytest.mark.parametrize("name", ["median.default", "dist.default"])
def test_what_mixes_the_samples_is_refused(name, tmp_path):
    functions = {
        "median.default": lambda z: z - z.median(),
        "dist.default": lambda z: z * torch.dist(z, z.sin()),
    }
    model = opened(functions[name], tmp_path)
    with pytest.warns(match="depends on the others"), pytest.raises(UnsupportedOp, match=name.split(".")[0]):
        PLAIN.attribute(model, points()[:1], target(0), points(seed=1)[:1])


# -- divisions by what nearly vanishes


NEARLY = {
    "l2": lambda z: z / (z.norm(dim=2, keepdim=True) + 1e-9),
    "normalize": lambda z: F.normalize(z, dim=2),
    "by hand": lambda z: (z - z.mean(2, True)) / ((z - z.mean(2, True)).square().mean(2, True) + 1e-12).sqrt(),
    "layer norm": lambda z: F.layer_norm(z, (6,), eps=1e-14),
    "rms norm": lambda z: F.rms_norm(z, (4, 6), eps=1e-14),
    "group norm": lambda z: F.group_norm(z, 2, eps=1e-14),
    "instance norm": lambda z: F.instance_norm(z, eps=1e-14),
}


@pytest.mark.parametrize("name", NEARLY)
def test_a_division_by_almost_nothing_is_refused_or_integrated_in_the_rows_that_need_it(name, tmp_path):
    model, x, to = opened(NEARLY[name], tmp_path), points(), target(0, 1, 0)
    baseline = points(seed=1)
    baseline[1] = 0
    with pytest.raises(InputError, match=r"nearly vanishes at the baseline.*-o fallback=integrate"):
        PLAIN.attribute(model, x, to, baseline)
    result = INTEGRATES.attribute(model, x, to, baseline)
    assert [bool(text) for text in result.note] == [False, True, False]
    assert gap(model, x, to, baseline, INTEGRATES) < EXACT
    others = torch.tensor([0, 2])
    plain = PLAIN.attribute(model, x[others], to.take(others), baseline[others]).values
    assert torch.allclose(result.values[others], plain, rtol=1e-12, atol=0)


def test_a_divisor_that_changes_its_sign_is_refused(tmp_path):
    model = opened(lambda z: z.sin() / (z[:, :, :1] * 1e-12 - 1e-9 * (z[:, :1, :1] > 0) + 1), tmp_path)
    assert gap(model, points(), target(0, 1, 0), points(seed=1), INTEGRATES) < EXACT
    model = opened(lambda z: z.sin() / z[:, :1, :1], tmp_path)
    x, baseline = points(), points(seed=1)
    baseline[:] = x * -1e-9
    with pytest.raises(InputError, match="changes its sign"):
        INTEGRATES.attribute(model, x, target(0, 1, 0), baseline)
