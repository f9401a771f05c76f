"""Batches on their way to the device: to a GPU from pinned memory, on a stream beside what it computes."""

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


class Sent:
    """Model inputs (N, ...) that are copied to a device from now on; `arrived` is asked when they are needed."""

    def __init__(self, arrays: Sequence[Array], dtype: torch.dtype, device: torch.device) -> None:
        self._batch, self._device = torch.from_numpy(np.stack(arrays)).to(dtype), device
        self._event: Any = None
        if device.type == "cuda":
            with suppress(torch.OutOfMemoryError), torch.cuda.stream(_stream(device)):  # there may be room later
                self._batch = self._batch.pin_memory().to(device, non_blocking=True)
                self._event = torch.cuda.current_stream(device).record_event()

    def arrived(self) -> torch.Tensor:
        """The batch on the device; what is computed with it there waits for the copy, and nothing else does."""
        if self._event is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(self._event)
            self._batch.record_stream(here)
        return self._batch.to(self._device)


@cache
def _stream(device: torch.device) -> Any:
    """The stream of copies to a GPU."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
