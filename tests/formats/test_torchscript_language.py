"""The language of scripted models: every feature that the snippets use gives the ScriptModule's outputs."""

import pytest
import torch
from nets import assert_close, build, load_script, ready, save_scripted
from script_snippets import SNIPPETS
from torch import Tensor
from torch.utils import _pytree


@pytest.mark.parametrize("frozen", [False, True], ids=["scripted", "frozen"])
@pytest.mark.parametrize("name", SNIPPETS)
def test_a_feature_of_the_language(name, frozen, tmp_path):
    path = save_scripted(ready(SNIPPETS[name]()), tmp_path / "net.pt", frozen=frozen)
    graph, script = build(path, (3, 4)), load_script(path)
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, 4, dtype=torch.float64, requires_grad=True)
        theirs = [leaf for leaf in _pytree.tree_leaves(script(x.clone())) if isinstance(leaf, Tensor)]
        mine = graph(x)
        assert len(mine) == len(theirs)
        for ours, other in zip(mine, theirs, strict=True):
            assert_close(ours, other)
            assert_close(*(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (ours, other)))
