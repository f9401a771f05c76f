"""Inputs: files, directories, globs and lists to records with ids, and one record to numbers.

What holds for every input:

- An id is the path relative to the folder that all arguments share, with ``/``; a record inside a file adds ``#key``,
  ``#row``, ``#key[row]``, a FASTA record's id or the value of a table's ``id`` column. Bytes that are not UTF-8
  show as ``\\udcXX``.
- Records are sorted by path, then by their place in the file, whatever the order of the arguments.
- Listing never fails for one bad file: it becomes a record, and ``read`` says what is wrong with it.
"""

from attrcli.data.containers import SUFFIXES
from attrcli.data.images import decode_image, to_channels
from attrcli.data.labels import UNKNOWN_LABEL, class_labels, labels_csv
from attrcli.data.listing import collect, guess_kind
from attrcli.data.reading import Raw, letter_count, read, sha256_of
from attrcli.data.records import Collection, Record, escape
from attrcli.data.tables import first_header

__all__ = [
    "SUFFIXES",
    "UNKNOWN_LABEL",
    "Collection",
    "Raw",
    "Record",
    "class_labels",
    "collect",
    "decode_image",
    "escape",
    "first_header",
    "guess_kind",
    "labels_csv",
    "letter_count",
    "read",
    "sha256_of",
    "to_channels",
]
