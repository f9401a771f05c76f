"""Files made by hand for the tests of inputs, and what is found in them."""

import io
import struct
import zlib

import h5py
import numpy as np
from PIL import Image

from attrcli.data import collect, read

F_SHAPE = np.zeros((6, 4, 3), np.uint8)  # no symmetry: every orientation shows
F_SHAPE[0, :, 0] = 250
F_SHAPE[3, :2, 1] = 200
F_SHAPE[1:, 0, 2] = 150


def save(path, pixels=F_SHAPE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def ids(collection):
    return [record.id for record in collection.records]


def only(path, kind="image", **options):
    """Read the one record of a file."""
    (record,) = collect([str(path)], kind, **{k: v for k, v in options.items() if k != "channels"}).records
    return read(record, kind, **{k: v for k, v in options.items() if k != "sample_rank"})


def png(width, height, depth, colour, rows=b""):
    """A PNG made by hand: header, one data chunk, end."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BATCH = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def array_file(path):
    if path.suffix == ".npy":
        np.save(path, BATCH)
    elif path.suffix == ".npz":
        np.savez_compressed(path, z=BATCH, one=BATCH[0])
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("z", data=BATCH, chunks=(1, 3, 4), compression="gzip")
            file["one"] = BATCH[0]
            file.create_group("group")["ignored"] = BATCH
    return path
