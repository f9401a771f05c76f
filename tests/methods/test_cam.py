"""The CAM family: closed forms, the default node, its grid, upsampling."""

import warnings

import pytest
import torch
from grid_nets import Gap, Tail, TinyVit
from method_nets import away, batch, open_net, target
from nets import ready
from torch import Tensor, nn
from zoo import ZOO

from attrcli import methods, model
from attrcli.errors import AttrcliError, ModelError, UsageError
from attrcli.graph import engine
from attrcli.methods import grad_cam, grad_cam_pp, layer_cam
from attrcli.methods._grid import located, upsampled

SHAPE, CAMS = (3, 8, 12), ("grad_cam", "grad_cam_pp", "layer_cam")


def explain(name, net, x, folder, index=(0, 1, 2), **options):
    return methods.load(name, options).attribute(open_net(net, folder, tuple(x.shape[1:])), x, target(*index), None)


def large(cells: Tensor, shape=SHAPE) -> Tensor:
    """Bilinear interpolation by hand: cell centres, edges held."""
    ways = []
    for small, whole in zip(cells.shape[1:], shape[1:], strict=True):
        at = ((torch.arange(whole, dtype=torch.float64) + 0.5) * small / whole - 0.5).clamp(0, small - 1)
        low = at.floor().long()
        way = torch.zeros(whole, small, dtype=torch.float64)
        way[range(whole), low] += 1 - (at - low)
        way[range(whole), (low + 1).clamp_max(small - 1)] += at - low
        ways.append(way)
    return torch.einsum("nhw,yh,xw->nyx", cells, *ways)[:, None]


def test_of_means_and_a_linear_head_grad_cam_is_cam(tmp_path):
    torch.manual_seed(0)
    net, x = Gap(), batch(3, *SHAPE)
    result = explain("grad_cam", net, x, tmp_path)
    cam = torch.einsum("nk,nkhw->nhw", net.head.weight[:3].double(), net.double().features(x)).clamp_min(0) / 24
    assert away(result.values, large(cam)) < 1e-12
    assert result.note == ("node relu, Nx4x4x6, grid 4x6",) * 3


def test_grad_cam_pp_of_means_in_closed_form(tmp_path):
    """w_k = Z g / (2 + S_k g) for g > 0, else 0."""
    torch.manual_seed(0)
    net, x = Gap(), batch(3, *SHAPE)
    values = explain("grad_cam_pp", net, x, tmp_path).values
    a, g = net.double().features(x), net.head.weight[:3].double() / 24
    w = torch.where(g > 0, 24 * g / (2 + a.sum((2, 3)) * g), 0)
    assert away(values, large(torch.einsum("nk,nkhw->nhw", w, a).clamp_min(0))) < 1e-12


def test_layer_cam_where_gradients_are_positive_sums_to_the_score(tmp_path):
    """A tail without biases, all weights positive: Layer-CAM is HiResCAM, which sums to f; Grad-CAM does not."""
    torch.manual_seed(0)
    net, x = Tail(side=6), batch(2, 3, 12, 12)
    net.second.weight.data.abs_(), net.head.weight.data.abs_()
    opened = open_net(net, tmp_path, (3, 12, 12))
    scores = opened.scores(x, target(0, 1))
    found = {}
    for name in ("layer_cam", "grad_cam"):
        result = methods.load(name, {"node": "relu"}).attribute(opened, x, target(0, 1), None)
        found[name] = result.values.sum((1, 2, 3)) / 4  # each cell became four
    assert away(found["layer_cam"][:, None], scores[:, None]) < 1e-12
    assert away(found["grad_cam"][:, None], scores[:, None]) > 1e-3


@pytest.mark.parametrize("module", [grad_cam, grad_cam_pp, layer_cam])
def test_weighing_by_loops(module):
    """The published sums, place by place."""
    value, gradient = batch(2, 3, 2, 4), batch(2, 3, 2, 4, seed=1)
    expected = torch.zeros(2, 2, 4, dtype=torch.float64)
    for n in range(2):
        for k in range(3):
            a, g = value[n, k], gradient[n, k]
            weight = g.mean()
            if module is grad_cam_pp:
                alpha = [t * t / (2 * t * t + a.sum() * t**3) * max(t, 0) for t in g.flatten().tolist()]
                weight = sum(alpha)
            expected[n] += (g.clamp_min(0) if module is layer_cam else weight) * a
    assert away(module.weigh(value, gradient), expected) < 1e-12


def test_dead_channels_and_zero_gradients_weigh_nothing():
    value, gradient = batch(1, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    for module in (grad_cam, grad_cam_pp, layer_cam):
        assert torch.equal(module.weigh(value, gradient), torch.zeros(1, 2, 2, dtype=torch.float64))


def test_one_channel_gives_its_own_picture(tmp_path):
    torch.manual_seed(0)
    net, x = Gap(maps=1), batch(1, *SHAPE)
    net.head.weight.data.abs_()
    values = explain("grad_cam", net, x, tmp_path, (0,)).values
    shown = large(net.double().features(x)[:, 0])
    assert away(values / values.max(), shown / shown.max()) < 1e-12


@pytest.mark.parametrize("name", CAMS)
def test_flipping_the_input_flips_the_map(name, tmp_path):
    """Features by a 1 x 1 convolution, a tail that does not tell places apart."""
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        batch(3, *SHAPE),
    )
    values, flipped = (explain(name, net, given, tmp_path).values for given in (x, x.flip(2, 3)))
    assert away(flipped, values.flip(2, 3)) < 1e-12


@pytest.mark.parametrize("name", CAMS)
def test_a_constant_added_to_every_logit_changes_nothing(name, tmp_path):
    torch.manual_seed(0)
    net, x = Gap(), batch(3, *SHAPE)
    before = explain(name, net, x, tmp_path).values
    net.head.bias.data += 7
    assert away(explain(name, net, x, tmp_path).values, before) < 1e-12


def test_guided_grad_cam_is_the_product_of_its_parts(tmp_path):
    torch.manual_seed(0)
    net, x = Tail(side=6), batch(3, 3, 12, 12)
    product, guided, cam = (
        explain(n, net, x, tmp_path).values for n in ("guided_grad_cam", "guided_backprop", "grad_cam")
    )
    assert product.shape == x.shape
    assert torch.equal(product, guided * cam)
    net.head.weight.data *= 3
    assert away(explain("guided_grad_cam", net, x, tmp_path).values, 9 * product) < 1e-12


def test_upsampling_is_between_the_centres_of_cells():
    assert upsampled(torch.tensor([[0.0, 1.0]]), (2, 4)).flatten().tolist() == [0, 0.25, 0.75, 1]
    cells = batch(2, 4, 6)
    assert away(upsampled(cells, (3, 8, 12)), large(cells)) < 1e-12
    assert away(upsampled(cells, (3, 8, 12)).mean((2, 3)), cells.mean((1, 2))[:, None]) < 1e-12
    assert upsampled(batch(2, 2, 3, 4), (1, 4, 6, 8)).shape == (2, 1, 4, 6, 8)


# -- the node ------------------------------------------------------------------------------------------------------

PLACES = {
    "vgg": ("Nx10x2x2", (2, 2)),
    "resnet": ("Nx16x2x2", (2, 2)),
    "densenet": ("Nx18x4x4", (4, 4)),
    "inception": ("Nx20x6x6", (6, 6)),
    "mobilenet": ("Nx16x4x4", (4, 4)),
    "efficientnet": ("Nx16x4x4", (4, 4)),
    "convnext": ("Nx12x2x2", (2, 2)),
    "big_transfer": ("Nx8x4x4", (4, 4)),
    "wavenet": ("Nx8x24", (24,)),
    "vit": ("Nx17x8", (4, 4)),
    "vit_fused": ("Nx17x8", (4, 4)),
    "swin": ("Nx16x4x4", (4, 4)),
    "mixer": ("Nx16x8", (4, 4)),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_default_node_of_the_zoo(name, tmp_path):
    torch.manual_seed(2)
    shape = next(iter(ZOO[name].inputs.values())).shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that a trace writes down
        opened = open_net(ready(ZOO[name].make()), tmp_path, shape)
    place = located(opened, shape, "auto", "auto", "grad_cam")
    said, sizes = PLACES[name]
    assert place.sizes == sizes
    assert said in str(place)
    if name.startswith("vit"):
        assert "layer_norm_2" in str(place)  # the last block's first norm, not its output: only the class token goes on
        assert "without 1 tokens" in str(place)
    result = methods.load("grad_cam").attribute(opened, batch(6, *shape), target(0, 1, 2, 0, 1, 2), None)
    assert result.values.shape == (6, 1, *shape[1:])
    assert result.values.abs().max() > 0


def by_hooks(net, module, x, index):
    """Value of a module's output and the gradient there, by autograd."""
    kept = []
    handle = module.register_forward_hook(lambda _, __, output: kept.append(output))
    score = net(x.clone().requires_grad_())[range(len(x)), index].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    return kept[0].detach(), gradient


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("shape", [(2, 9, 13), (3, 6, 12), (3, 12)])
def test_tokens_go_back_to_their_places(tokens, shape, tmp_path):
    """Patches in rows and columns; class token and registers left out; input that is not square."""
    torch.manual_seed(0)
    net, x = TinyVit(shape, tokens=tokens).double().eval(), batch(3, *shape)
    result = explain("grad_cam", net, x, tmp_path)
    module = net.norms[2] if tokens else net.norms[-1]
    value, gradient = (part[:, tokens:] for part in by_hooks(net, module, x, [0, 1, 2]))
    sizes = net.patches(x).shape[2:]
    cells = (gradient.mean(1, keepdim=True) * value).sum(2).reshape(3, *sizes).clamp_min(0)
    assert away(result.values, upsampled(cells, shape)) < 1e-10
    assert f"grid {'x'.join(map(str, sizes))}" in result.note[0]


def test_windows_as_hooks_tell(tmp_path):
    torch.manual_seed(0)
    net, x = ready(ZOO["swin"].make()), batch(2, 3, 16, 16)
    values = explain("layer_cam", net, x, tmp_path, (0, 1)).values
    value, gradient = by_hooks(net, net.norm2, x, [0, 1])
    cells = (gradient.clamp_min(0) * value).sum(3).clamp_min(0)
    assert away(values, upsampled(cells, (3, 16, 16))) < 1e-10


def test_any_node_that_is_named_folded_or_not(tmp_path, monkeypatch):
    """A convolution before its batch norm keeps its own value, where the graph that runs has it folded."""
    torch.manual_seed(0)
    net, x = ready(ZOO["resnet"].make()), batch(2, 3, 16, 16)
    names = ("convolution_2", "batch_norm_2", "relu_1")
    before = [explain("grad_cam", net, x, tmp_path, (0, 1), node=name).values for name in names]
    monkeypatch.setattr(engine, "HEAVY", 0)
    for name, expected in zip(names, before, strict=True):
        assert expected.abs().max() > 0
        assert away(explain("grad_cam", net, x, tmp_path, (0, 1), node=name).values, expected) < 1e-10


def test_channels_last_in_the_file(tmp_path):
    class Last(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.permute(0, 3, 1, 2))

    torch.manual_seed(0)
    net, x = Gap(), batch(3, *SHAPE)
    expected = explain("grad_cam", net, x, tmp_path).values
    opened = open_net(Last(net), tmp_path, (8, 12, 3))
    opened.bind(layout="NHWC")
    values = methods.load("grad_cam").attribute(opened, x, target(0, 1, 2), None).values
    assert values.shape == (3, 1, 8, 12)
    assert away(values, expected) < 1e-12


def test_a_frozen_batch(tmp_path):
    """Exported with a batch of two: five rows run in groups, the last padded."""
    torch.manual_seed(0)
    net, x = Gap().eval(), batch(5, *SHAPE).float()
    expected = explain("grad_cam", net, x.double(), tmp_path, (0, 1, 2, 3, 4)).values
    path = tmp_path / "frozen.pt2"
    torch.export.save(torch.export.export(net.float(), (torch.randn(2, *SHAPE),)), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = model.load(path, precision="float64")
        for rows in (2, 32):
            opened.rows = rows
            for name in ("grad_cam", "excitation_backprop", "guided_backprop"):
                values = methods.load(name).attribute(opened, x.double(), target(0, 1, 2, 3, 4), None).values
                assert len(values) == 5
                assert name != "grad_cam" or away(values, expected) < 1e-5  # the file's weights were float32
                alone = methods.load(name).attribute(opened, x[4:].double(), target(4), None).values
                assert away(values[4:], alone) < 1e-12


TABULAR = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("net", "shape", "options", "kind", "match"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(96, 3)), (2, 6, 8), {}, ModelError, "no node has channels and a grid"),
        (TABULAR, (7,), {}, ModelError, "grad_cam: a sample of 7 has no grid"),
        (TABULAR, (7,), {"node": "relu", "grid": "2x2"}, ModelError, "a sample of 7 has no grid"),
        (nn.Conv2d(2, 3, 1), (2, 6, 8), {}, UsageError, "the output itself has a grid"),
        (Gap(2), (2, 6, 8), {"grid": "6x8"}, UsageError, "-o grid=6x8 says what lies at a node that is named"),
        (Gap(2), (2, 6, 8), {"node": "reluu"}, UsageError, "no node 'reluu' in the graph; did you mean 'relu'"),
        (Gap(2), (2, 6, 8), {"node": "linear"}, UsageError, r"axes of node 'linear' \(Nx5\) are .* say -o grid=HxW"),
        (Gap(2), (2, 6, 8), {"node": "relu", "grid": "3"}, UsageError, "-o grid=3: give 2 sizes, as in 14x14"),
        (Gap(2), (2, 6, 8), {"node": "relu", "grid": "5x5"}, UsageError, "accepted: N x tokens x channels"),
    ],
)
def test_refused(net, shape, options, kind, match, tmp_path):
    """What the model lacks is the model's error, a node or a grid that is named badly is the user's."""
    for name in CAMS:
        with pytest.raises(AttrcliError, match=match.replace("grad_cam:", f"{name}:")) as caught:
            explain(name, net, batch(3, *shape), tmp_path, **options)
        assert caught.type is kind


class Shuffled(nn.Module):
    """Patches in an order that a table gives."""

    order: Tensor

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 3)
        self.register_buffer("order", torch.randperm(24))

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)[:, self.order]
        return self.head(torch.cat([x.mean(1, keepdim=True), x], 1).relu().square().mean(1))


def test_where_the_grid_is_lost_sight_of_it_is_asked_for_not_guessed(tmp_path):
    torch.manual_seed(0)
    net, x = Shuffled(), batch(3, *SHAPE)
    with pytest.raises(
        UsageError, match=r"the grid is lost sight of at node 'index' .*; if one has, name it with --at"
    ):
        explain("grad_cam", net, x, tmp_path)
    with pytest.raises(UsageError, match=r"which axes of node 'relu' .* say -o grid=HxW"):
        explain("grad_cam", net, x, tmp_path, node="relu")
    result = explain("grad_cam", net, x, tmp_path, node="relu", grid="4x6")
    assert result.note[0] == "node relu, Nx25x4, grid 4x6 without 1 tokens"
    value, gradient = _at_relu(net.double(), x)
    cells = (gradient.mean(1, keepdim=True) * value).sum(2).reshape(3, 4, 6).clamp_min(0)
    assert away(result.values, large(cells)) < 1e-12


def _at_relu(net, x):
    """Value and gradient of the patches after the ReLU."""
    y = net.conv(x).flatten(2).transpose(1, 2)[:, net.order]
    a = torch.cat([y.mean(1, keepdim=True), y], 1).relu().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net.head(a.square().mean(1))[range(3), range(3)].sum(), a)
    return a.detach()[:, 1:], gradient[:, 1:]
