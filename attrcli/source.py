"""The inputs of a run file, read again: for pictures of them, and for other tools."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from attrcli import data, sidecar
from attrcli.errors import InputError
from attrcli.preprocess import Preprocess
from attrcli.store import RunFile


@dataclass(frozen=True)
class Source:
    """Where the inputs of a run file lie, and how the model saw them; `records` are those inside files of several."""

    root: Path
    preprocess: Preprocess
    records: dict[str, data.Record] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunFile, root: Path | None = None) -> "Source":
        """The inputs as the run file recorded them, or below another root."""
        p = sidecar.from_mapping(run.attributes["preprocess"], str(run.path), None)
        return cls(root or Path(run.attributes["inputs_root"]), p)

    def read(self, name: str, sha256: str) -> data.Raw:
        """Read one input again. Raises InputError when it is gone, or no longer what was explained."""
        p = self.preprocess
        found = data.read(self._record(name), p.kind, channels=p.channels, columns=p.columns)
        if found.sha256 != sha256:
            raise InputError(f"{name!r}: the file changed since it was explained; run explain again")
        return found

    def _record(self, name: str) -> data.Record:
        path = self.root / name
        if path.is_file():
            return data.Record(name, path)
        if name not in self.records:
            file = self.root / name.rpartition("#")[0]
            if not file.is_file():
                raise InputError(f"{name!r}: no such file below {self.root}; --root FOLDER says where the inputs are")
            p = self.preprocess
            found = data.collect([os.fspath(file)], p.kind, columns=p.columns, sample_rank=p.sample_rank)
            prefix = name.rpartition("#")[0].rpartition("/")[0]
            for record in found.records:
                self.records[f"{prefix}/{record.id}" if prefix else record.id] = record
        if name not in self.records:
            raise InputError(f"{name!r}: no such record")
        return self.records[name]
