"""Safetensors files: read the header, read numbers into an array, write a file from a stream of arrays.

The format is a length, a JSON header and the numbers. The library's own reader and writer hold a second copy of
the weights (mapped or real); these do not, so a model near the size of the memory passes through.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgpt.errors import UserError

# BF16: the bits, widened below.
DTYPES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor's numbers."""

    file: Path
    dtype: str  # safetensors' name of the type, such as F32
    shape: tuple[int, ...]
    start: int  # byte of the file at which they begin


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; reads only its header. A UserError says that the file is broken or cut off."""
    try:
        with safe_open(file, framework="numpy"):  # checks that the header is sound and fits the file's length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: broken or cut off ({reason}); copy or download it again") from None
    header.pop("__metadata__", None)
    start = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
    return {name: StoredTensor(file, e["dtype"], tuple(e["shape"]), start[name]) for name, e in header.items()}


def read_into(out: np.ndarray, stored: StoredTensor, first_row: int = 0) -> None:
    """Fill the float32 array `out` from the file, beginning with row `first_row` of the tensor.

    Not through a memory map: its pages would count as this process's memory, beside the array.
    """
    dtype = DTYPES[stored.dtype]
    with stored.file.open("rb") as stream:
        stream.seek(stored.start + first_row * math.prod(stored.shape[1:]) * dtype.itemsize)
        if stored.dtype == "F32":
            complete = stream.readinto(out.reshape(-1).view(np.uint8).data) == out.nbytes
        else:
            raw = np.fromfile(stream, dtype, out.size)
            if complete := raw.size == out.size:
                # The 16 bits of a bfloat16 are the upper half of the float32 of the same value.
                wide = raw.astype(np.float32) if stored.dtype == "F16" else (raw.astype(np.uint32) << 16)
                out[...] = wide.view(np.float32).reshape(out.shape)
    if not complete:
        raise UserError(f"{stored.file}: it became shorter while it was read")


def write_tensors(file: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterator[np.ndarray]) -> None:
    """Write float32 arrays, in the order of `shapes` ({name: shape}); one of them is held at a time."""
    # transformers reads a file only if it names the library whose layout it has: torch's, row by row.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of eight bytes
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _ in shapes:
            stream.write(np.ascontiguousarray(next(tensors), DTYPES["F32"]).data)
