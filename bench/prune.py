"""Pruning: prediction change against sparsity on the sample CNN, and what prune_grad costs beside its bare passes.

python bench/prune.py curve    # table, and bench/prune.png
python bench/prune.py time     # ratio to 2 forward + 2 backward, one thread, in turns
python bench/prune.py export   # size and time of the union of six masks as a model, in each format
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import nets
import torch

from attrcli import model as models
from attrcli import prune as verb
from attrcli.config import Config
from attrcli.methods import _pruning as pruning
from attrcli.methods import prune_grad
from attrcli.plan import Plan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
SCORES = {
    "prune_grad": pruning.gradient_scores,
    "prune_int": partial(pruning.integrated_scores, steps=10),
    "random": pruning.random_scores,
}


def curve() -> None:
    """For each criterion and sparsity: effective sparsity, mean |p'-p|/p, share of inputs whose class stays."""
    from PIL import Image, ImageDraw  # the chart is four lines

    inputs = str(ROOT / "sample_models/images/test")
    plan = Plan(
        Config(model=str(ROOT / "sample_models/fashion_cnn.pt"), inputs=(inputs,), method="prune_grad", out="none.h5")
    )
    x = plan.tensor([plan.read(record).x for record in plan.records])
    target = models.Target(plan.model.logits(x).argmax(1), seed=torch.arange(len(x)))
    net = pruning.Network(plan.model, x, "relu", "bench")
    found: dict[str, list[tuple[float, float, float]]] = {}
    for name in (*SCORES, "greedy"):
        scored = SCORES[name](net, x, target) if name in SCORES else None
        for share in SHARES:
            if scored is None:
                done = pruning.prune_greedily(net, x, target, share, None)
            else:
                done = pruning.finish(net, x, target, scored[1], pruning.masks_at(scored[0], [share] * len(x)))
            same = (done.after.argmax(1) == done.before.argmax(1)).double().mean()
            found.setdefault(name, []).append((float(done.sparsity.mean()), float(done.change.mean()), float(same)))
            print(f"{name:<11} {share:.2f}  " + "  ".join(f"{value:.3f}" for value in found[name][-1]), flush=True)
    page = Image.new("RGB", (760, 340), "white")
    draw = ImageDraw.Draw(page)
    colours = {"prune_grad": "#1f77b4", "prune_int": "#2ca02c", "greedy": "#d62728", "random": "#7f7f7f"}
    for panel, title in enumerate(("mean |p'-p|/p", "share of inputs with the same class")):
        left = 45 + panel * 375
        draw.rectangle((left, 40, left + 310, 290), outline="#999999")
        draw.text((left, 14), f"{title}, against effective sparsity", fill="black")
        for tick in range(6):
            draw.text((left - 6, 290 - 50 * tick), f"{tick / 5:.1f}", fill="black", anchor="rm")
            draw.text((left + 62 * tick, 298), f"{0.5 + tick / 10:.1f}", fill="black", anchor="ma")
        for row, (name, points) in enumerate(found.items()):
            line = [(left + 620 * (s - 0.5), 290 - 250 * min(1.0, (c, a)[panel])) for s, c, a in points if s >= 0.5]
            draw.line(line, fill=colours[name], width=2)
            draw.text((left + 8, 52 + 14 * row + 130 * panel), name, fill=colours[name])
    page.quantize(64).save(HERE / "prune.png", optimize=True)


def cost(rounds: int = 5, count: int = 4) -> None:
    """prune_grad / (2 forward + 2 backward of the network tuned by hand), medians of ratios within a round."""
    import tempfile

    folder = tempfile.mkdtemp()
    example = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    path = nets.save(nets.resnet18(), example, folder)["torchscript"]
    model = models.load(path, threads=1)
    model.rows = count
    x = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    raw, target = nets.by_hand(nets.resnet18()), models.Target(torch.zeros(count, dtype=torch.long))
    method = prune_grad.PruneGrad()

    def floor() -> None:
        for _ in range(2):
            leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            torch.autograd.grad(raw(leaf)[:, 0].sum(), leaf)

    def ours() -> None:
        method.attribute(model, x, target, None)

    def seconds(run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    floor(), ours()
    pairs = [(seconds(ours), seconds(floor)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"prune_grad {min(a for a, _ in pairs):.2f} s, floor {min(b for _, b in pairs):.2f} s, ratio {ratio:.2f}")


def export() -> None:
    """Parameters, bytes, and time of 16 rows on one thread, of the sample models pruned for the bags, over theirs."""
    import tempfile

    wanted = verb.Wanted("prune_grad", max_output_change=0.15, export="union")
    for stem in ("fashion_mlp", "fashion_cnn"):
        for suffix in (".pt", ".pt2", ".onnx"):
            model, bags = ROOT / f"sample_models/{stem}{suffix}", str(ROOT / "sample_models/images/test/Bag")
            given = {"model": str(model), "inputs": (bags,), "threads": 1}
            found = []
            for _ in range(5):
                with tempfile.TemporaryDirectory() as folder:
                    done = verb.prune(verb.plan(wanted, **given, out=f"{folder}/out"), wanted)
                found.append(done.seconds[1] / done.seconds[0])
            (whole, small), (before, after) = done.bytes, done.parameters
            print(
                f"{stem}{suffix:<6} parameters {after / before:.3f}  bytes {small / whole:.3f} ({whole} to {small})  "
                f"time {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    {"curve": curve, "time": cost, "export": export}[sys.argv[1]]()
