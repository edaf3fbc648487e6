"""Writing safetensors files from tensors that are still in pieces.

The safetensors library wants whole tensors and copies each before it writes: time, and more memory than the bound allows. Its
format is simple enough to be written directly: the length of a header (8 bytes, little-endian), the header (JSON: number
format, shape and place of each tensor), and the tensors' bytes, end to end (https://github.com/huggingface/safetensors#format).
Its own reader reads the files back.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FORMATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_ALIGNMENT = 8  # of the first tensor; readers map the file into memory


def write_tensors(path: Path, tensors: Mapping[str, Sequence[Tensor]], metadata: Mapping[str, str]) -> None:
    """Write each tensor, given as pieces that follow one another along the first axis, under a temporary name; sync and rename.

    A file of this name is therefore whole. That it is there survives a power cut once its folder is synced, which is left to the
    caller, who may have more files for it. On any error nothing is left.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, pieces in tensors.items():
        first = pieces[0]
        start, end = end, end + sum(piece.nbytes for piece in pieces)
        shape = [sum(len(piece) for piece in pieces), *first.shape[1:]]
        header[name] = {"dtype": _FORMATS[first.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for pieces in tensors.values():
                for piece in pieces:
                    file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
