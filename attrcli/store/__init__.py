"""The HDF5 files: schema, crash-safe writing, resuming, reading.

`RunWriter` writes a run file and resumes it, `RunFile` reads one, finished or still in progress.
"""

from .disk import disk_errors, replacing, write_datasets
from .layout import EXTRAS, SCHEMA, UNLABELLED, VERSION_KEYS, VOLATILE, Columns, Layout, Status, config_of
from .reader import RunFile, is_run_file
from .writer import RunWriter

__all__ = [
    "EXTRAS",
    "SCHEMA",
    "UNLABELLED",
    "VERSION_KEYS",
    "VOLATILE",
    "Columns",
    "Layout",
    "RunFile",
    "RunWriter",
    "Status",
    "config_of",
    "disk_errors",
    "is_run_file",
    "replacing",
    "write_datasets",
]
