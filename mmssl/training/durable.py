"""Files that are hashed while they are written, and on the disk when the call returns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 8 << 20  # bytes that are hashed while the next ones are written
DTYPES = {
    **{f"float{n}": f"F{n}" for n in (16, 32, 64)},
    **{f"int{n}": f"I{n}" for n in (8, 16, 32, 64)},
    "uint8": "U8",
    "bool": "BOOL",
    "bfloat16": "BF16",
}


class Written(NamedTuple):
    """What is on the disk."""

    size: int
    sha256: str


def write_all(files: Mapping[Path, Iterable[Any]]) -> dict[str, Written]:
    """Write files at the same time, each from its pieces. Returns: by name. Raises: OSError."""
    with ThreadPoolExecutor(max(1, len(files))) as pool:
        return dict(zip((path.name for path in files), pool.map(write, files, files.values())))


def write(path: Path, pieces: Iterable[Any]) -> Written:
    """Write a new file and wait until it is on the disk. A second thread hashes. Raises: OSError."""
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with ThreadPoolExecutor(1) as hasher:
            for piece in pieces:
                hasher.submit(digest.update, piece)
                rest = memoryview(piece)
                size += len(rest)
                while rest:
                    rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return Written(size, digest.hexdigest())


def safetensors(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The pieces of a safetensors file, without a copy of what is on the CPU already. Raises: ValueError for other dtypes."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all begin at multiples of theirs
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"{name}: {dtype} cannot be saved, only {', '.join(DTYPES)}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _pieces(len(text).to_bytes(8, "little") + text, [tensors[name] for name in names])


def _pieces(header: bytes, tensors: list[Tensor]) -> Iterator[Any]:
    import torch

    yield header
    for tensor in tensors:
        array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = memoryview(array)
        for begin in range(0, len(data), PIECE):
            yield data[begin : begin + PIECE]
