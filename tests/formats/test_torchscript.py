"""TorchScript: outputs and gradients of the graph are the ScriptModule's; what cannot be walked is refused by name."""

import pytest
from nets import ANY_WAY, assert_same, build, load_script, ready, save_scripted, save_traced

# --- right


@pytest.mark.parametrize("name", ANY_WAY)
@pytest.mark.parametrize("how", ["traced", "scripted", "frozen"])
def test_outputs_and_gradients_are_the_script_modules(name, how, tmp_path):
    make, shape = ANY_WAY[name]
    if how == "traced" and name == "tied":
        pytest.skip("a trace does not take a module that holds one parameter under two names")
    module = ready(make())
    path = tmp_path / "net.pt"
    if how == "traced":
        save_traced(module, shape, path)
    else:
        save_scripted(module, path, frozen=how == "frozen")
    assert_same(build(path, shape), load_script(path), shape)
