"""`.pt2`: outputs and gradients of the graph are the eager module's; nothing in a hostile archive is ever run."""

import pytest
from nets import ANY_WAY, assert_same, build, ready, save_exported

# --- right


@pytest.mark.parametrize("decomposed", [False, True], ids=["plain", "decomposed"])
@pytest.mark.parametrize("name", ANY_WAY)
def test_outputs_and_gradients_are_the_modules(name, decomposed, tmp_path):
    if decomposed and name == "writes_to_chunks":
        pytest.skip("torch's own decomposition fixes the batch of this module")
    make, shape = ANY_WAY[name]
    module = ready(make())
    path = save_exported(module, shape, tmp_path / "net.pt2", decomposed=decomposed)
    assert_same(build(path, shape), module, shape)
