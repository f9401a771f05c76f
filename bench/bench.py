"""Benchmarks: prints the tables of bench/README.md. Run on an otherwise idle machine: `make bench`.

Every contender lives in a process of its own, set up as its user would have it; the processes take turns, one
measurement each per round, and every figure is the median over the rounds of the ratio within a round. Ratios hold
where absolute times drift.

    python bench/bench.py [speed] [single] [wall] [startup] [loading] [memory]     # default: all
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))
THREADS = len(os.sched_getaffinity(0))
ROUNDS = 9
SAMPLES = ROOT / "sample_models"
TASKS = {  # images per measurement, options of integrated gradients and of occlusion, rows per pass
    "fashion_cnn": {"images": 16, "shape": (1, 28, 28), "steps": 50, "patch": 4, "stride": 2, "rows": 64},
    "resnet18, one pass": {"images": 16, "shape": (3, 224, 224), "rows": 16},
    "resnet18": {"images": 2, "shape": (3, 224, 224), "steps": 50, "patch": 32, "stride": 32, "rows": 16},
}


def worker(pipe: Connection, contender: str, network: str, method: str, folder: str) -> None:
    """Answer every message with the seconds that one measurement took."""
    import torch

    torch.set_num_threads(THREADS)
    run = (CONTENDERS | BFLOAT16)[contender](network, method, Path(folder))
    run()
    pipe.send("ready")
    while pipe.recv():
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)


def _inputs(task: dict[str, Any]) -> Any:
    import torch

    torch.manual_seed(1)
    return torch.randn(task["images"], *task["shape"])


def _module(network: str) -> Any:
    """The eager module, as a Captum user has it; the sample CNN's eager source is its own TorchScript."""
    import nets
    import torch

    return nets.resnet18() if network != "fashion_cnn" else torch.jit.load(SAMPLES / "fashion_cnn.pt").eval()


def _captum(network: str, method: str, folder: Path) -> Callable[[], Any]:
    import torch
    from captum.attr import DeepLift, GuidedBackprop, IntegratedGradients, LayerGradCam, Occlusion, Saliency

    task = TASKS[network]
    inputs, net = _inputs(task), _module(network)
    target = torch.zeros(len(inputs), dtype=torch.long)
    if method == "gradient":
        saliency = Saliency(net)
        return lambda: saliency.attribute(inputs, target, abs=False)
    if method == "guided_backprop":
        guided = GuidedBackprop(net)
        return lambda: guided.attribute(inputs.requires_grad_(), target)
    if method == "grad_cam":
        cam = LayerGradCam(net, net.blocks)
        return lambda: LayerGradCam.interpolate(cam.attribute(inputs, target, relu_attributions=True), (224, 224))
    if method == "deeplift":
        deeplift = DeepLift(net)
        return lambda: deeplift.attribute(inputs, inputs * 0, target)
    if method == "integrated_gradients":
        explainer = IntegratedGradients(net)
        return lambda: explainer.attribute(
            inputs, inputs * 0, target, n_steps=task["steps"], internal_batch_size=task["rows"]
        )
    channels, patch, stride = task["shape"][0], task["patch"], task["stride"]
    occlusion, each = Occlusion(net), max(1, task["rows"] // task["images"])
    window, strides = (channels, patch, patch), (channels, stride, stride)
    return lambda: occlusion.attribute(inputs, window, strides, 0, target, perturbations_per_eval=each)


def _captum_tuned(network: str, method: str, folder: Path) -> Callable[[], Any]:
    """Captum with attrcli's allocator set-up."""
    from attrcli.graph.engine import set_up

    set_up(THREADS)
    return _captum(network, method, folder)


def _attrcli(kind: str, precision: str = "float32") -> Callable[[str, str, Path], Callable[[], Any]]:
    def make(network: str, method: str, folder: Path) -> Callable[[], Any]:
        import torch

        from attrcli import methods
        from attrcli import model as models

        task = TASKS[network]
        names = {"torchscript": "fashion_cnn.pt", "onnx": "fashion_cnn.onnx"}
        path = (
            SAMPLES / names[kind]
            if network == "fashion_cnn"
            else folder / {"torchscript": "net.pt", "onnx": "net.onnx"}[kind]
        )
        model = models.load(path, threads=THREADS, precision=precision)
        model.rows = task["rows"]
        options = {k: task[k] for k in OPTIONS[method]}
        explainer, inputs = methods.load(method, options), _inputs(task)
        target = models.Target(torch.zeros(len(inputs), dtype=torch.long))
        return lambda: explainer.attribute(model, inputs, target, inputs * 0)

    return make


def _raw(network: str, method: str, folder: Path) -> Callable[[], Any]:
    """The bare passes that the method needs, on the network tuned by hand: folded, channels last, allocator set up."""
    import nets
    import torch

    from attrcli.graph.engine import set_up

    set_up(THREADS)
    task = TASKS[network]
    own = network == "fashion_cnn"
    net = torch.jit.freeze(_module(network)) if own else nets.by_hand(nets.resnet18())
    layout = torch.contiguous_format if own else torch.channels_last
    windows = (-(-(task["shape"][1] - task["patch"]) // task["stride"]) + 1) ** 2 if method == "occlusion" else 0
    count = task["images"] * {"occlusion": windows + 1, "integrated_gradients": task.get("steps", 1)}.get(method, 1)
    torch.manual_seed(1)
    rows = torch.randn(task["rows"], *task["shape"]).to(memory_format=layout)

    def run() -> None:
        for start in range(0, count, task["rows"]):
            part = rows[: min(task["rows"], count - start)]
            if method != "occlusion":
                leaf = part.detach().requires_grad_(True)
                torch.autograd.grad(net(leaf)[:, 0].sum(), leaf)
            else:
                with torch.no_grad():
                    net(part)

    return run


OPTIONS: dict[str, tuple[str, ...]] = {
    "integrated_gradients": ("steps",),
    "occlusion": ("patch", "stride"),
    "gradient": (),
    "deeplift": (),
    "grad_cam": (),
    "guided_backprop": (),
    "lrp": (),
}
CONTENDERS = {
    "captum": _captum,
    "captum + allocator": _captum_tuned,
    "raw passes by hand": _raw,
    "attrcli, TorchScript": _attrcli("torchscript"),
    "attrcli, ONNX": _attrcli("onnx"),
}
BFLOAT16 = {"attrcli, bf16": _attrcli("torchscript", "bf16")}


def speed(folder: Path) -> dict[str, Any]:
    """Medians of seconds and of ratios, by network and method."""
    import nets
    import torch

    nets.save(nets.resnet18(), torch.randn(2, 3, 224, 224), folder)
    return _compared(("fashion_cnn", "resnet18"), ("integrated_gradients", "occlusion"), [*CONTENDERS], folder)


def single(folder: Path) -> dict[str, Any]:
    """The same for what takes one pass."""
    import nets
    import torch

    nets.save(nets.resnet18(), torch.randn(2, 3, 224, 224), folder)
    network = ("resnet18, one pass",)
    named = ("gradient", "deeplift", "grad_cam", "guided_backprop")
    alone = [name for name in CONTENDERS if "captum" not in name]  # what Captum's LRP computes here is something else
    found = _compared(network, named, [*CONTENDERS, *BFLOAT16], folder)
    return found | _compared(network, ("lrp",), alone, folder)


def _compared(networks: Sequence[str], methods: Sequence[str], names: Sequence[str], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for network in networks:
        for method in methods:
            seconds = _interleaved(network, method, names, folder)
            ours = {name: times for name, times in seconds.items() if name.startswith("attrcli")}
            found[f"{network} {method}"] = {
                "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
                "ratios": {
                    f"{name} / {other}": _ratio(times, seconds[other])
                    for name, times in ours.items()
                    for other in seconds
                    if other not in ours
                },
            }
            print(json.dumps({f"{network} {method}": found[f"{network} {method}"]}, indent=1), flush=True)
    return found


def _ratio(first: list[float], second: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(first, second, strict=True)), 3)


def _interleaved(network: str, method: str, names: Sequence[str], folder: Path) -> dict[str, list[float]]:
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], other = context.Pipe()
        process = context.Process(target=worker, args=(other, name, network, method, str(folder)), daemon=True)
        process.start()
        processes.append(process)
        pipes[name].recv()  # one at a time: nothing runs beside a measurement
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return seconds


def _photos(folder: Path, count: int) -> Path:
    """Pictures of the size of a web photo: smooth noise, 320 x 256, JPEG."""
    import numpy as np
    from PIL import Image

    images = folder / "photos"
    images.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = generator.integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 256), Image.Resampling.BICUBIC).save(images / f"{i:04}.jpg", quality=90)
    return images


def wall(folder: Path) -> dict[str, Any]:
    """explain on 64 photos against its compute alone, in one process, alternating; then with overlays.

    10 steps, not the default 50: what is not compute weighs five times as much.
    """
    import nets
    import torch

    from attrcli import methods, overlays
    from attrcli import model as models
    from attrcli.explain import Config, Plan, explain
    from attrcli.render import Style

    paths = nets.save(nets.resnet18(), torch.randn(2, 3, 224, 224), folder)
    images = _photos(folder, 64)
    ratios, drawn = [], []
    for round_ in range(2):
        out = folder / f"run{round_}.h5"
        config = Config(
            paths["torchscript"],
            (str(images),),
            "integrated_gradients",
            str(out),
            options={"steps": 10},
            preprocess="imagenet",
            batch_size=16,
            threads=THREADS,
        )
        start = time.perf_counter()
        plan = Plan(config)
        explain(plan)
        whole = time.perf_counter() - start
        model = models.load(paths["torchscript"], threads=THREADS)
        model.rows = 16
        explainer = methods.load("integrated_gradients", {"steps": 10})
        inputs = torch.stack([plan.tensor([plan.read(record).x])[0] for record in plan.records])
        target = models.Target(torch.zeros(64, dtype=torch.long))
        start = time.perf_counter()
        for i in range(0, 64, 16):
            explainer.attribute(model, inputs[i : i + 16], target.take(torch.arange(i, i + 16)), inputs[i : i + 16] * 0)
        compute = time.perf_counter() - start
        start = time.perf_counter()
        overlays.draw(out, folder / f"overlays{round_}", Style())
        ratios.append(whole / compute)
        drawn.append((time.perf_counter() - start) / compute)
    return {
        "explain / compute alone": round(statistics.median(ratios), 3),
        "overlays / compute alone": round(statistics.median(drawn), 4),
    }


def startup(folder: Path) -> dict[str, Any]:
    """Median seconds of commands that must answer at once."""
    found = {}
    for words in (["--help"], ["--version"], ["methods"], ["methods", "integrated_gradients"]):
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "attrcli", *words], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        found[" ".join(words)] = round(statistics.median(times), 3)
    return found


def loading(folder: Path) -> dict[str, Any]:
    """Median seconds to open a ResNet-50 and build its graph, in a fresh process each, after torch is imported."""
    import nets
    import torch

    paths = nets.save(nets.resnet50(), torch.randn(2, 3, 224, 224), folder)
    found = {}
    for name, path in paths.items():
        code = "import time, torch; start = time.perf_counter(); from attrcli import model; "
        code += f"model.load({path!r}, threads={THREADS}).engine((3, 224, 224)); print(time.perf_counter() - start)"
        times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(ROUNDS)]
        found[name] = round(statistics.median(times), 2)
    return found


def memory(folder: Path) -> dict[str, Any]:
    """Peak memory of explain over 200 and over 2,000 inputs, MB, each in a process of its own."""
    import shutil

    train = sorted((SAMPLES / "images" / "train").glob("*/*.png"))
    found: dict[str, Any] = {}
    for count in (200, 2000):
        images = folder / f"images{count}"
        images.mkdir()
        for i in range(count):
            shutil.copy(train[i % len(train)], images / f"{i:05}.png")
        command = [sys.executable, "-m", "attrcli", "explain", str(SAMPLES / "fashion_cnn.onnx"), str(images)]
        command += ["-m", "integrated_gradients", "-o", "steps=10", "--out", str(folder / f"memory{count}.h5"), "-q"]
        code = f"import resource, subprocess; subprocess.run({command!r}, check=True, stdout=subprocess.DEVNULL); "
        code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        found[f"{count} inputs"] = round(int(subprocess.check_output([sys.executable, "-c", code])) / 1024)
    found["ratio"] = round(found["2000 inputs"] / found["200 inputs"], 3)
    return found


def main() -> None:
    """Run the parts that are named, or all."""
    parts = {"speed": speed, "single": single, "wall": wall, "startup": startup, "loading": loading, "memory": memory}
    chosen = sys.argv[1:] or list(parts)
    results = {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = parts[name](Path(folder))
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
