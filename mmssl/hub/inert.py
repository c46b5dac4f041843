"""Files of `torch.save`, read without running anything that they name.

Pickle builds objects by calling what a file names. Here it calls nothing: tensors and plain containers are made by this module,
and whatever else a file describes (configurations of frameworks that are not installed, or worse) stays a `Record` of it.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.errors import RecipeError

MACHINE: Any = pickle._Unpickler  # the one in Python: that in C lets nobody override what an instruction does
LARGEST = 64 << 20  # bytes that describe a file's objects; those of tensors lie elsewhere in it
DTYPES = {
    **{"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}
MALFORMED = (pickle.UnpicklingError, zipfile.BadZipFile, ValueError, TypeError, LookupError, AttributeError, EOFError,
             RuntimeError, RecursionError, MemoryError, OverflowError, NotImplementedError)  # fmt: skip


@dataclass(frozen=True)
class Global:
    """A class or function that a file names; never imported."""

    name: str


@dataclass(eq=False)
class Record:
    """What the file says of an object that is not built."""

    of: Global
    args: Sequence[Any] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)  # of a dict of a class of its own

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def extend(self, rows: Any) -> None:
        """Rows of a list of a class of its own; nobody asks for them."""


@dataclass(frozen=True)
class Storage:
    """A row of numbers beside the description."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Reader(MACHINE):
    """Pickle's machine, whose calls are all answered by `_make`."""

    dispatch = dict(MACHINE.dispatch)

    def find_class(self, module: str, name: str) -> Any:  # noqa: D102
        return Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:  # noqa: D102
        kind, of, key, _, count = pid
        dtype = DTYPES.get(of.name.rpartition(".")[2]) if isinstance(of, Global) else None
        if kind != "storage" or dtype is None or not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError(f"numbers of an unknown kind: {kind} {getattr(of, 'name', of)}")
        return Storage(dtype, key, count)

    def _call(self) -> None:  # REDUCE and NEWOBJ
        args = self.stack.pop()
        self.stack[-1] = _make(self.stack[-1], args)

    def _call_named(self) -> None:  # NEWOBJ_EX
        kwargs, args = self.stack.pop(), self.stack.pop()
        self.stack[-1] = _make(self.stack[-1], (*args, kwargs))

    def _call_marked(self) -> None:  # OBJ
        of, *args = self.pop_mark()
        self.append(_make(of, args))

    def _call_spelled(self) -> None:  # INST
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(_make(self.find_class(module, name), self.pop_mark()))

    def _build(self) -> None:  # attributes: of a record kept, of a plain container passed over
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    dispatch |= {
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.NEWOBJ_EX[0]: _call_named,
        pickle.OBJ[0]: _call_marked,
    }
    dispatch |= {pickle.INST[0]: _call_spelled, pickle.BUILD[0]: _build}


def _tensor(storage: Storage, offset: int, shape: Sequence[int], stride: Sequence[int], *_: Any) -> Stored:
    if not isinstance(storage, Storage) or any(not isinstance(n, int) or n < 0 for n in (offset, *shape, *stride)):
        raise pickle.UnpicklingError("a tensor of an unknown form")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if math.prod(shape) > storage.count or (math.prod(shape) and last >= storage.count):
        raise pickle.UnpicklingError(f"a tensor of {tuple(shape)} in {storage.count} numbers")
    return Stored(storage, offset, tuple(shape), tuple(stride))


MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda rows=(): dict(rows),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": lambda sizes: tuple(sizes),
    "builtins.set": lambda rows=(): set(rows),
    "__builtin__.set": lambda rows=(): set(rows),
}


def _make(of: Any, args: Any) -> Any:
    """What a call would give: one of `MAKERS`, or a record of the call."""
    if not isinstance(of, Global):
        raise pickle.UnpicklingError("calls what is no name")
    return MAKERS[of.name](*args) if of.name in MAKERS else Record(of, args)


class TorchFile:
    """A file of `torch.save`, as torch writes it since version 1.6; open within a `with` statement."""

    def __init__(self, path: str | Path):
        """Read what the file describes, as `content`; numbers are read when asked for.

        Raises: RecipeError if it is no such file.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise RecipeError(f"{path}: there is no such file.")
        try:
            self._archive = zipfile.ZipFile(self.path)
            (name,) = (n for n in self._archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl"))
            self._root = name.removesuffix("data.pkl")
            self.content: Any = Reader(io.BytesIO(self._read("data.pkl", LARGEST))).load()
        except (*MALFORMED, OSError) as error:
            raise self._unreadable(error) from None

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def tensor(self, stored: Stored) -> Tensor:
        """Its numbers. Raises: RecipeError if they are not there."""
        storage = stored.storage
        size = storage.count * storage.dtype.itemsize
        try:
            if not size:
                return torch.empty(stored.shape, dtype=storage.dtype)
            data = bytearray(self._read(f"data/{storage.key}", size))
            return torch.frombuffer(data, dtype=storage.dtype, count=storage.count).as_strided(
                stored.shape, stored.stride, stored.offset
            )
        except MALFORMED as error:
            raise self._unreadable(error) from None

    def _read(self, name: str, most: int) -> bytes:
        """An entry of the archive, of at most so many bytes; torch compresses none, and a compressed one could be a bomb."""
        entry = self._archive.getinfo(self._root + name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
            raise ValueError(f"{name} is compressed, or larger than {most} bytes")
        return self._archive.read(entry)

    def _unreadable(self, error: BaseException) -> RecipeError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return RecipeError(
            f"{self.path} cannot be read as a file of torch.save ({reason}). One that torch wrote before version 1.6 must be "
            "saved again by a newer torch, where its origin is trusted."
        )


def told(content: Any, *roots: str) -> Callable[[str, Any], Any]:
    """Function: dotted path, type -> the value of that type in what a file says of its configuration, or None.

    Args:
        roots: dotted paths of configurations; the first that has the value counts. Of a flat one, marked by `*` at its end,
            the last word of a path.
    """

    def look(path: str, kind: Any) -> Any:
        for root in roots:
            inner = path.rpartition(".")[2] if root.endswith("*") else path
            value = _reach(content, [*root.rstrip("*").split("."), *inner.split(".")])
            if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
                return value
        return None

    return look


def _reach(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        inner = _inside(value)
        value = inner.get(key) if isinstance(inner, dict) else None
    return _inside(value)


def _inside(value: Any) -> Any:
    """The dict or plain value that a record stands for: its attributes, and what omegaconf keeps in `_content` and `_val`."""
    for _ in range(8):  # a file may be a loop
        if isinstance(value, Record):
            value = value.state if value.state is not None else value.entries or (value.args[0] if value.args else None)
        elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
            value = value[1]  # attributes in slots
        elif isinstance(value, dict) and ("_content" in value or "_val" in value):
            value = value["_content"] if "_content" in value else value["_val"]
        else:
            break
    return value
