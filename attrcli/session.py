"""An ONNX file in ONNX Runtime, for forward passes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attrcli.errors import InputError, ModelError

Array = npt.NDArray[Any]


class Session:
    """A session whose only output is one tensor of the file; `batch` rows a call, any number where that is None.

    Raises ModelError when ONNX Runtime cannot open the file.
    """

    def __init__(self, path: Path, data: bytes | str, device: torch.device, batch: int | None) -> None:
        import onnxruntime

        self.path, self.batch = path, batch
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what fails is raised, and said once
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # the file's function, not integer kernels'
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=[*providers, "CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(f"{path}: ONNX Runtime cannot open it: {str(error)[:300]}") from error

    def run(self, arguments: Mapping[str, Array]) -> Array:
        """Run on rows (N, ...) of all inputs: (N, K, ...). Raises InputError for values that it cannot run on."""
        count, batch = len(next(iter(arguments.values()))), self.batch
        if batch is None:
            return self._call(arguments)
        parts = []
        for start in range(0, count, batch):
            kept = min(batch, count - start)
            group = {name: _padded(value[start : start + kept], batch) for name, value in arguments.items()}
            result = self._call(group)
            parts.append(result.reshape(batch, *result.shape[result.shape[:1] == (batch,) :])[:kept])
        return np.concatenate(parts)

    def _call(self, arguments: Mapping[str, Array]) -> Array:
        try:
            result: Array = self._session.run(None, dict(arguments))[0]
        except Exception as error:
            raise InputError(f"{self.path}: ONNX Runtime: {str(error)[:300]}") from error
        return result


def _padded(rows: Array, count: int) -> Array:
    """The rows, the last one repeated up to the count."""
    return rows if len(rows) == count else np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), 0)])
