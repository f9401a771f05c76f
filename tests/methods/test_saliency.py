import pytest
import torch
from method_nets import NETS, Linear, away, batch, images, open_net, predicted, sample, script, target

from attrcli import methods

SALIENCY = methods.load("saliency")


def test_of_a_linear_score_it_is_the_size_of_the_weights(tmp_path) -> None:
    net = Linear(12)
    values = SALIENCY.attribute(open_net(net, tmp_path, (3, 4)), batch(2, 3, 4), target(2, 0), None).values
    assert away(values, net.layer.weight[[2, 0]].abs().reshape(2, 3, 4)) < 1e-15


@pytest.mark.parametrize("net", NETS)
def test_equals_the_size_of_autograd_on_bundled_images(net: str) -> None:
    x = images()[0][:10]
    to = target(*predicted(net)[:10].tolist())
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(script(net)(leaf).gather(1, to.index[:, None]).sum(), leaf)
    values = SALIENCY.attribute(sample(net), x, to, None).values
    assert (values >= 0).all()
    each = [away(*pair) for pair in zip(values.split(1), expected.abs().split(1), strict=True)]
    assert sorted(each)[-3] < 1e-5  # see test_gradient.py: a tie may fall the other way


def test_a_gradient_of_zero_stays_zero(tmp_path) -> None:
    net = Linear(4)
    with torch.no_grad():
        net.layer.weight[:, 1] = 0
    values = SALIENCY.attribute(open_net(net, tmp_path, (4,)), batch(2, 4), target(0, 1), None).values
    assert (values[:, 1] == 0).all()
    assert (values[:, [0, 2, 3]] > 0).all()
