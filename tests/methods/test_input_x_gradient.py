import pytest
import torch
from method_nets import NETS, Linear, Relu, away, batch, images, open_net, predicted, sample, script, target

from attrcli import methods

INPUT_X_GRADIENT = methods.load("input_x_gradient")


def test_of_a_linear_score_it_is_weight_times_input(tmp_path) -> None:
    net = Linear(12)
    x = batch(2, 3, 4)
    values = INPUT_X_GRADIENT.attribute(open_net(net, tmp_path, (3, 4)), x, target(2, 0), None).values
    assert away(values, x * net.layer.weight[[2, 0]].reshape(2, 3, 4)) < 1e-15


def test_sums_to_the_score_of_a_relu_net_without_biases(tmp_path) -> None:
    torch.manual_seed(0)
    net = Relu(10)
    for layer in (net.layers[1], net.layers[3]):
        torch.nn.init.zeros_(layer.bias)
    model = open_net(net, tmp_path, (10,))
    x, to = batch(5, 10), target(0, 1, 2, 0, 1)
    values = INPUT_X_GRADIENT.attribute(model, x, to, None).values
    assert torch.allclose(values.sum(1), model.scores(x, to), rtol=1e-12, atol=1e-14)


def test_an_input_of_zero_gets_zero(tmp_path) -> None:
    x = batch(2, 4)
    x[:, 2] = 0
    values = INPUT_X_GRADIENT.attribute(open_net(Linear(4), tmp_path, (4,)), x, target(0, 1), None).values
    assert (values[:, 2] == 0).all()


@pytest.mark.parametrize("net", NETS)
def test_equals_autograd_on_bundled_images(net: str) -> None:
    x = images()[0][:10]
    to = target(*predicted(net)[:10].tolist())
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(script(net)(leaf).gather(1, to.index[:, None]).sum(), leaf)
    values = INPUT_X_GRADIENT.attribute(sample(net), x, to, None).values
    each = [away(*pair) for pair in zip(values.split(1), (x * expected).split(1), strict=True)]
    assert sorted(each)[-3] < 1e-5  # see test_gradient.py: a tie may fall the other way
