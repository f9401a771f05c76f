"""Models that keep something from one call to the next, make objects, switch gradients off, or fork."""

from typing import Optional

import pytest
import torch
from nets import assert_same, build, exported, load_script, quiet, save_exported, save_scripted, save_traced
from torch import Tensor, nn

from attrcli.errors import UnsupportedOp


class Buffer(nn.Module):
    """Base of those with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", torch.full((3,), 2.0, dtype=torch.float64))


class Counts(Buffer):
    def forward(self, x: Tensor) -> Tensor:
        self.held.add_(1)
        return x * self.held


class MovingMean(Buffer):
    def forward(self, x: Tensor) -> Tensor:
        y = x - self.held
        self.held.mul_(0.9).add_(x.mean(0) * 0.1)
        return y


class WritesToAPart(Buffer):
    def forward(self, x: Tensor) -> Tensor:
        self.held[1:].fill_(5.0)
        return x * self.held


class CountsForNobody(Buffer):
    def forward(self, x: Tensor) -> Tensor:
        self.held.add_(1)
        return x * 2


class Scratch(Buffer):
    def forward(self, x: Tensor) -> Tensor:
        self.held.copy_(torch.arange(3))
        return x * self.held + self.held.sin()


def save_decomposed(module, shape, path):
    with quiet():
        torch.export.save(exported(module, shape).run_decompositions(), path)
    return path


SAVED = {
    "scripted": (".pt", lambda module, shape, path: save_scripted(module, path)),
    "traced": (".pt", save_traced),
    "exported": (".pt2", save_exported),
    "decomposed": (".pt2", save_decomposed),
}


@pytest.mark.parametrize("how", SAVED)
@pytest.mark.parametrize("make", [Counts, MovingMean, WritesToAPart])
def test_an_output_that_depends_on_the_calls_before_is_refused(make, how, tmp_path):
    suffix, save = SAVED[how]
    path = save(make(), (3,), tmp_path / f"net{suffix}")
    with pytest.raises(UnsupportedOp, match="changes its own state: it writes to 'held', and reads it"):
        build(path, (3,))


@pytest.mark.parametrize("how", SAVED)
@pytest.mark.parametrize("make", [CountsForNobody, Scratch])
def test_state_that_no_output_depends_on_is_left_out(make, how, tmp_path):
    suffix, save = SAVED[how]
    path = save(make(), (3,), tmp_path / f"net{suffix}")
    graph = build(path, (3,))
    assert_same(graph, make(), (3,))
    assert "held" not in {node.target for node in graph.graph.nodes}


class Fills(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        mask[1:] += 1
        return x * mask


def test_a_constant_that_a_trace_lets_every_call_change_is_refused(tmp_path):
    path = save_traced(Fills(), (3,), tmp_path / "net.pt")
    script, x = load_script(path), torch.ones(1, 3, dtype=torch.float64)
    assert not torch.equal(script(x), script(x))
    with pytest.raises(UnsupportedOp, match="changes its own state: it writes to 'constant'"):
        build(path, (3,))


@pytest.mark.parametrize("how", ["scripted", "exported", "decomposed"])
def test_a_constant_that_every_call_makes_anew_is_no_state(how, tmp_path):
    suffix, save = SAVED[how]
    assert_same(build(save(Fills(), (3,), tmp_path / f"net{suffix}"), (3,)), Fills(), (3,))


class Stashes(nn.Module):
    """Keeps a tensor for whoever asks, and reads it in the same call."""

    last: Optional[Tensor]  # noqa: UP045

    def __init__(self) -> None:
        super().__init__()
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2
        last = self.last
        assert last is not None
        return x + last


def test_an_attribute_that_is_set_before_it_is_read(tmp_path):
    assert_same(build(save_scripted(Stashes(), tmp_path / "net.pt"), (3,)), Stashes(), (3,))


class ReadsFirst(Stashes):
    def forward(self, x: Tensor) -> Tensor:
        last = self.last
        self.last = x
        return x if last is None else x + last


def test_an_attribute_that_is_read_before_it_is_set_is_refused(tmp_path):
    with pytest.raises(UnsupportedOp, match="SetAttr: the model changes its own state: it reads 'last', and sets it"):
        build(save_scripted(ReadsFirst(), tmp_path / "net.pt"), (3,))


class Unwatched(nn.Module):
    """A part of the model that autograd does not see."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight, index = (x * 2).max(dim=1)
        return x * weight[:, None] + index[:, None]


@pytest.mark.parametrize(
    "save", [lambda module, path: save_scripted(module, path), lambda m, p: save_exported(m, (3,), p)]
)
def test_no_gradient_goes_through_what_was_under_no_grad(save, tmp_path):
    path = save(Unwatched(), tmp_path / "net.pt")
    x = torch.tensor([[1.0, 5.0, 2.0]], dtype=torch.float64, requires_grad=True)
    y = build(path, (3,))(x)[0]
    assert y.tolist() == [[11.0, 51.0, 21.0]]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[10.0, 10.0, 10.0]]


class WritesUnwatched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        with torch.no_grad():
            y.mul_(2)
        return y


def test_writing_in_place_under_no_grad_is_refused(tmp_path):
    with pytest.raises(UnsupportedOp, match=r"op aten.mul_ under torch.no_grad\(\) is not supported"):
        build(save_scripted(WritesUnwatched(), tmp_path / "net.pt"), (3,))


class Pair:
    """An object of a class of the file."""

    def __init__(self, first: Tensor, times: int) -> None:
        self.first = first
        self.times = times

    def product(self) -> Tensor:
        return self.first * self.times


class MakesObjects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        pairs = [Pair(x, 2), Pair(x + 1, 3)]
        pairs[0].times += 5
        total = torch.zeros_like(x)
        for pair in pairs:
            total = total + pair.product()
        return total


def test_objects_of_classes_of_the_file(tmp_path):
    path = save_scripted(MakesObjects(), tmp_path / "net.pt")
    assert_same(build(path, (3,)), lambda x: x * 7 + (x + 1) * 3, (3,))


class Forks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        ahead = torch.jit.fork(torch.sin, x)
        y = x * 2
        return y + torch.jit.wait(ahead)


@pytest.mark.parametrize("save", [lambda m, p: save_scripted(m, p), lambda m, p: save_traced(m, (3,), p)])
def test_a_fork_runs_in_its_place(save, tmp_path):
    assert_same(build(save(Forks(), tmp_path / "net.pt"), (3,)), lambda x: x * 2 + x.sin(), (3,))
