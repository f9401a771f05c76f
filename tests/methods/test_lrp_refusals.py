"""LRP: bounds, options and run files; what is refused, by name."""

import warnings

import dense_lrp
import pytest
import torch
from lrp_nets import Residual, chain, gap, lrp, quietly
from method_nets import SAMPLES, Kinked, away, batch, images, open_net, sample, target
from nets import exported
from torch import Tensor, nn
from torch.nn import functional as F

from attrcli import methods
from attrcli import model as models
from attrcli.config import Config
from attrcli.errors import AttrcliWarning, UnsupportedOp, UsageError
from attrcli.explain import explain
from attrcli.model import Target
from attrcli.plan import Plan
from attrcli.store import RunFile

# -- bounds, scores, refusals


def test_z_box_is_refused_without_bounds(tmp_path):
    model = open_net(Kinked(), tmp_path, (2, 9, 13))
    with pytest.raises(
        UsageError, match=r"composite=epsilon_gamma_box needs the lowest and the highest.*model\.bounds"
    ):
        lrp(model, batch(2, 2, 9, 13), target(0, 1), composite="epsilon_gamma_box")


def test_bounds_go_through_what_comes_before_the_first_layer(tmp_path):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(2, 3, 2)
            self.register_buffer("scale", torch.tensor([[2.0], [-3.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x - 0.5) * self.scale).flatten(1)

    torch.manual_seed(0)
    net = Scaled()
    model, x = open_net(net, tmp_path, (2, 4)), torch.rand(2, 2, 4).double()
    model.bounds = (torch.tensor(0.0).double(), torch.tensor(1.0).double())
    values = lrp(model, x, target(0, 4), composite="epsilon_gamma_box").values
    low = torch.tensor([[-1.0], [-1.5]]).double()
    for i, k in enumerate((0, 4)):
        given = torch.zeros(9).double()
        given[k] = model.scores(x, target(0, 4))[i]
        a = (x[i : i + 1] - 0.5) * net.scale
        inner = dense_lrp.linear("zbox", net.layer, a, given, epsilon=1e-6, box=(low, -low))
        # a constant subtracted takes its share: (x - .5) keeps x / (x - .5) of it
        shift = x[i] - 0.5
        expected = inner[0] * x[i] / (shift + 1e-6 * dense_lrp.sign(shift))
        assert away(values[i : i + 1], expected[None]) < 1e-9


def test_a_frozen_batch_changes_nothing(tmp_path):
    torch.manual_seed(0)
    net, x, to = chain().double().eval(), batch(3, 2, 10, 11), target(0, 1, 2)
    torch.export.save(exported(net, (2, 10, 11), batch=2), tmp_path / "net.pt2")
    frozen, found = models.load(tmp_path / "net.pt2", precision="float64"), []
    for model in (frozen, quietly(net, tmp_path, 2, 10, 11)):
        model.bounds = (torch.tensor(-5.0).double(), torch.tensor(5.0).double())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttrcliWarning)
            found.append(lrp(model, x, to, composite="epsilon_gamma_box"))
            assert gap(model, found[-1], x, to) < 1e-12
    assert away(found[0].values, found[1].values) < 1e-10
    assert away(found[0].remainder[:, None], found[1].remainder[:, None]) < 1e-10


def test_bounds_come_from_the_preprocessing_of_images(tmp_path):
    config = Config(
        str(SAMPLES / "fashion_cnn.onnx"), (str(SAMPLES / "images" / "test"),), "lrp", str(tmp_path / "x.h5"),
        options={"composite": "epsilon_gamma_box"},
    )  # fmt: skip
    low, high = Plan(config).model.bounds
    x, black = images()
    assert float(low) == pytest.approx(float(black.min()))
    assert float(high) == pytest.approx(float(x.max()))  # some pixel is white


def test_a_run_file_holds_what_adds_up(tmp_path):
    out = tmp_path / "x.h5"
    config = Config(
        str(SAMPLES / "fashion_cnn.onnx"), (str(SAMPLES / "images" / "test" / "Bag"),), "lrp", str(out),
        options={"composite": "epsilon_gamma_box"}, precision="float64",
    )  # fmt: skip
    explain(Plan(config))
    with RunFile(out) as run:
        total = run["attribution"][:].reshape(6, -1).sum(1) + run["remainder"][:]
        score = run["score"][:]
    assert total == pytest.approx(score, rel=1e-5)  # scores and remainders are stored in float32


def test_scores_that_are_no_logits_are_refused():
    model, x = sample("fashion_mlp"), images()[0][:1]
    with pytest.raises(UsageError, match=r"lrp explains logits.*--score prob"):
        lrp(model, x, Target(torch.tensor([0]), "prob"))


@pytest.mark.parametrize(("options", "message"), [({"epsilon": 0}, "a positive number"), ({"gamma": -1}, "zero or a")])
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        methods.load("lrp", options)


def test_a_contrast_starts_with_both_scores(tmp_path):
    torch.manual_seed(0)
    model, x = open_net(Residual(), tmp_path, (2, 9, 11)), batch(2, 2, 9, 11)
    one, other = target(0, 1), target(2, 0)
    both = lrp(model, x, Target(one.index, minus=other.index)).values
    assert away(both, lrp(model, x, one).values - lrp(model, x, other).values) < 1e-12


class Refused(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(6, 6), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)).flatten(1))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: z.prod(2, keepdim=True), r"node 'prod' is op aten\.prod.*lrp has no rule.*integrated_gradients"),
        (lambda z: z.softmax(2), "node 'softmax'.*only with -o attention=attnlrp or -o attention=cp"),
        (lambda z: F.layer_norm(z, (6,)), "node 'layer_norm'.*only with -o attention"),
        (lambda z: F.rms_norm(z, (6,)), "node 'rms_norm'.*only with -o attention"),
        (lambda z: F.group_norm(z, 2), "node 'group_norm'.*only with -o attention"),
        (lambda z: z @ z.transpose(1, 2), "node 'matmul'.*only with -o attention"),
        (lambda z: F.scaled_dot_product_attention(z, z, z), "'scaled_dot_product_attention'.*only with -o attention"),
        (lambda z: z.std(2, keepdim=True), "node 'std'.*lrp has no rule"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(function, message, tmp_path):
    net = Refused(function)
    net(torch.zeros(1, 4, 6))
    with pytest.raises(UnsupportedOp, match=message):
        lrp(quietly(net, tmp_path, 4, 6), batch(2, 4, 6), target(0, 1))


def test_a_recurrent_layer_is_refused(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(x)[0][:, -1])

    with pytest.raises(UnsupportedOp, match=r"lstm.*lrp has no rule"):
        lrp(quietly(Recurrent(), tmp_path, 5, 3), batch(2, 5, 3), target(0, 1))
