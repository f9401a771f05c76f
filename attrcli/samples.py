"""One input after another, read and preprocessed for the model."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from attrcli import data
from attrcli.errors import AttrcliWarning, InputError
from attrcli.preprocess import Preprocess

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """One input, read: raw values, model input channels first, hash; or the message of why it cannot be."""

    raw: Array
    x: Array
    sha256: str
    message: str = ""


_UNREAD = np.empty(0)


class Reader:
    """Reads the inputs of a run; what is read before its turn is kept until then."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self._ahead: dict[str, Sample] = {}
        self._said: set[str] = set()

    def peek(self, record: data.Record) -> Sample:
        """Read one input before its turn, and keep it."""
        if record.id not in self._ahead:
            self._ahead[record.id] = self.read(record)
        return self._ahead[record.id]

    def read(self, record: data.Record) -> Sample:
        """Read one input and preprocess it; what goes wrong is a message. Warns, once, of how images change."""
        if record.id in self._ahead:
            return self._ahead.pop(record.id)
        p = self.preprocess
        try:
            stored = data.read(record, p.kind, channels=p.channels, columns=p.columns)
            for note in stored.notes:
                if note not in self._said:
                    self._said.add(note)
                    warnings.warn(f"{record.id}: {note} (said once for all inputs)", AttrcliWarning, stacklevel=2)
            raw = p.fit(stored.values)
            return Sample(raw, self.encode(raw), stored.sha256)
        except InputError as error:
            return Sample(_UNREAD, _UNREAD, "", str(error))

    def encode(self, raw: Array) -> Array:
        """Raw values to one model input, channels first."""
        p = self.preprocess
        first = {"image": replace(p, layout="NCHW"), "sequence": replace(p, layout="NCL", flat=False)}
        return first.get(p.kind, p).normalize(raw)
