"""Where numbers come from: what a file of results says of the run that made it."""

import hashlib
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from attrcli import __version__, data, methods
from attrcli.plan import Plan

__all__ = ["attributes"]


def attributes(plan: Plan) -> dict[str, Any]:
    """All that made the numbers of a plan: method, options, versions, the SHA-256 of every file."""
    config, model = plan.config, plan.model
    return {
        "method": config.method,
        "options": {o.name: getattr(plan.method, o.name) for o in methods.description(config.method).options},
        "preprocess": plan.preprocess.as_dict(),
        "target": config.target,
        "score": config.score,
        "baseline": {"name": plan.baseline.name, "count": len(plan.baseline.fills)} if plan.baseline else None,
        "input": model.input,
        "output": config.output,
        "at": config.at,
        "reverse_complement": config.reverse_complement,
        "files": _files(plan),
        "inputs_root": str(plan.collection.root),
        "model": str(plan.path),
        "model_sha256": model.sha256,
        "model_format": model.format,
        "seed": config.seed,
        "batch_size": plan.batch_size,
        "threads": torch.get_num_threads(),
        "device": model.device.type,
        "precision": config.precision,
        "versions": {
            "attrcli": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnx", "onnxruntime", "numpy", "h5py", "pillow")},
        },
        "argv": sys.argv,
    }


def _files(plan: Plan) -> dict[str, str]:
    """SHA-256 of every file besides model and inputs."""
    files: dict[str, str | Path] = {}
    if plan.baseline is not None and plan.baseline.file is not None:
        files["baseline"] = plan.baseline.file
    if plan.config.labels is not None:
        files["labels"] = plan.config.labels
    fixed = {f"fix {name}": value for name, value in plan.config.fix.items()}
    files |= {name: value for name, value in fixed.items() if value != "zero"}
    return dict.fromkeys(fixed, "zero") | {name: _hash(Path(path)) for name, path in files.items()}


def _hash(path: Path) -> str:
    """SHA-256 of a file; of a directory, of the hashes and names of all that lies in it."""
    if not path.is_dir():
        return data.sha256_of(path)
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    listed = "".join(f"{data.sha256_of(file)} {file.relative_to(path)}\n" for file in inside)
    return hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()
