"""The engine: a graph made ready gives what the graph gives, in groups where its batch is frozen."""

import pytest
import torch
from nets import Residual, ResNet18, assert_close, build, ready, save_exported, save_traced
from torch import nn

from attrcli.errors import ModelError, UsageError
from attrcli.graph import engine
from attrcli.graph.build import FREE, Builder

aten = torch.ops.aten
CPU = torch.device("cpu")


def made(path, shape, output=None, batches=FREE):
    graph = build(path, shape, batches=batches)
    graph.meta["batches"] = batches
    frozen = batches[0] if batches[0] == batches[1] else None
    return engine.make(graph, output, CPU, frozen)


def test_a_network_with_a_head_runs_as_its_logits(tmp_path):
    module = ready(nn.Sequential(Residual(), nn.Softmax(dim=1)))
    ready_ = made(save_exported(module, (3, 6, 6), tmp_path / "net.pt2"), (3, 6, 6))
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    assert ready_.head == "softmax"
    assert ready_.output == "output"
    assert ready_.output_shape == (4,)
    assert_close(ready_(x), module[0](x), 1e-13)
    assert_close(ready_(x).softmax(1), module(x), 1e-13)


def test_a_wide_and_heavy_network_runs_in_channels_last(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "HEAVY", 1_000_000)
    module = ready(ResNet18(16, 10))
    wide = made(save_traced(module, (3, 32, 32), tmp_path / "net.pt"), (3, 32, 32))
    narrow = made(save_traced(ready(Residual()), (3, 32, 32), tmp_path / "small.pt"), (3, 32, 32))
    assert wide.channels_last
    assert not narrow.channels_last
    operations = {str(node.target) for node in wide.run.graph.nodes}
    assert "aten.batch_norm.default" not in operations
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_close(wide(x), module(x), 1e-12)
    assert wide.activation_bytes > 8 * 64 * 64 * 4


@pytest.mark.parametrize("batch", [1, 4])
def test_a_frozen_batch_runs_in_groups_and_the_last_one_is_padded(batch, tmp_path):
    module = ready(Residual())
    path = save_exported(module, (3, 5, 5), tmp_path / "net.pt2", batch=batch)
    frozen = made(path, (3, 5, 5), batches=(batch, batch))
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64).requires_grad_()
    assert_close(frozen(x), module(x), 1e-12)
    mine, theirs = (torch.autograd.grad(f(x).sin().sum(), x)[0] for f in (frozen, module))
    assert_close(mine, theirs, 1e-12)


def graph_of(function, batches=(3, 3)):
    b = Builder()
    x = b.placeholder("x", [(batch, 4) for batch in batches], torch.float32)
    result = function(b, x)
    graph = b.finish(result if isinstance(result, dict) else {"output": result})
    graph.meta["batches"] = batches
    return graph


def test_an_output_that_lost_the_frozen_batch_is_refused():
    graph = graph_of(lambda b, x: b.call(aten.reshape.default, x, [6, 2]))
    with pytest.raises(ModelError, match=r"output 'output' of \[6, 2\] does not keep the batch of 3"):
        engine.make(graph, None, CPU, 3)


def test_with_a_batch_of_one_the_output_may_lack_it():
    graph = graph_of(lambda b, x: b.call(aten.reshape.default, x, [4]), (1, 1))
    made = engine.make(graph, None, CPU, 1)
    x = torch.rand(3, 4)
    assert torch.equal(made(x), x)


def test_several_outputs_must_be_chosen_from():
    graph = graph_of(lambda b, x: {"a": b.call(aten.relu.default, x), "b": b.call(aten.sum.dim_IntList, x, [1])}, FREE)
    with pytest.raises(UsageError, match=r"several outputs: choose one with --output NAME: a \[4\], b \[\]"):
        engine.make(graph, None, CPU, None)
    with pytest.raises(UsageError, match="no output 'c'; outputs: a, b"):
        engine.make(graph, "c", CPU, None)
    assert engine.make(graph, "b", CPU, None)(torch.ones(2, 4)).tolist() == [4, 4]


def test_set_up_and_free_memory_work_on_this_machine():
    threads = torch.get_num_threads()
    engine.set_up(1)
    assert torch.get_num_threads() == 1
    engine.set_up(threads)
    assert 1 << 20 < engine.free_memory() < 1 << 50
