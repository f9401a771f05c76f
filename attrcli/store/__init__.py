"""The HDF5 files: schema, crash-safe writing, resuming, reading.

`RunWriter` writes a run file and resumes it, `RunFile` reads one, finished or still in progress.
"""

from .disk import Lock, disk_errors, replacing, require_folder, require_place, write_datasets
from .layout import EXTRAS, SCHEMA, UNLABELLED, VERSION_KEYS, VOLATILE, Columns, Layout, Status, config_of
from .masks import MASK_SCHEMA, MaskFile, MaskWriter, is_mask_file, writing_masks
from .reader import RunFile, is_run_file
from .writer import RunWriter

__all__ = [
    "EXTRAS",
    "MASK_SCHEMA",
    "SCHEMA",
    "UNLABELLED",
    "VERSION_KEYS",
    "VOLATILE",
    "Columns",
    "Layout",
    "Lock",
    "MaskFile",
    "MaskWriter",
    "RunFile",
    "RunWriter",
    "Status",
    "config_of",
    "disk_errors",
    "is_mask_file",
    "is_run_file",
    "replacing",
    "require_folder",
    "require_place",
    "write_datasets",
    "writing_masks",
]
