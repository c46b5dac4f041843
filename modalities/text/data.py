"""Documents to text, and a whole set of documents to blocks of token ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pyarrow.compute import call_function
from torch import Tensor

from mmssl.types import Rejected
from modalities.text.tokenizer import begin_id, encode, end_id, stretches

COLUMNS = ("text", "content", "sentence", "document", "article", "body", "file_name", "path", "file")
SUFFIXES = (".txt", ".text", ".md", ".rst")
STRETCH, BATCH = 1 << 16, 1 << 22  # characters that are tokenised in one piece, and at once
MAX_BYTES = 1 << 28  # of a document
FORMAT = 1  # of the cached blocks


def decode(value: Any) -> str | np.ndarray:
    """The text of a document; token ids, (n,) int64, are passed on.

    Args:
        value: path, content in UTF-8, or a list of token ids.
    Raises: Rejected.
    """
    if isinstance(value, (list, np.ndarray)):
        return np.asarray(value, np.int64)
    if isinstance(value, (str, os.PathLike)):
        value = _read(value)
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise Rejected("wrong_type", f"{type(value).__name__} is no path, text or token ids")
    value = bytes(value)
    try:
        text = value.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise Rejected("bad_text", f"byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    if "\0" in text:
        raise Rejected("bad_text", f"byte {value.index(0)} is NUL, which no text holds")
    if not text or text.isspace():
        raise Rejected("empty", "white space only" if text else "no text")
    return text


def sizes(sample: str | np.ndarray) -> dict[str, float]:
    """Length in characters, or in tokens if they are ids."""
    return {"characters" if isinstance(sample, str) else "tokens": len(sample)}


def raw(sample: str) -> Tensor:
    """Words hashed to 4096 signed counts, of length 1. (4096,) float32."""
    return torch.from_numpy(_hashing().transform([sample]).toarray()[0].astype(np.float32))


def prepare(source: Any, views: Any, quarantine: Any) -> Any:
    """The source as token ids, tokenised once and kept in the cache of `datasets` for runs to come.

    With `views.pack`, blocks of `views.max_tokens - 1` tokens that run across documents, each of which closes with the end
    token; what does not fill a block at the end is left out. Without, each document by itself with beginning and end, in equal
    pieces of at most `views.max_tokens` if it is longer. Documents that cannot be read are left out and recorded. A stream
    without packing stays as it is, and so do documents that belong to pairs.

    Raises: ValueError if there is nothing to learn from, if a stream is to be packed, or if the tokenizer does not fit.
    """
    tokenizer = views.tokenizer
    if source.paired and views.pack:
        raise ValueError("views.pack: blocks run across documents, which belong to pairs; set views.pack=false")
    if source.streaming and views.pack:
        raise ValueError("views.pack: a stream cannot be packed; set views.pack=false or data.streaming=false")
    if source.streaming or source.paired:
        return source
    rows = _cached(source, tokenizer, views.pack, views.max_tokens)
    good = rows.data.column("bad").null_count  # they come first, and one row for the end last
    quarantine.seen(source.size)
    for row in rows.select(range(good, len(rows) - 1)):
        kind, _, reason = row["bad"].partition(": ")
        quarantine.record(source.identity(row["document"]), kind, reason)
    if not good:
        raise ValueError(
            f"data.path: {source.facts.get('path')} holds too little text: {source.size} documents, of which "
            f"{len(rows) - 1} cannot be used, make no block of tokens. Add text."
        )
    rows = rows.select(range(good))
    lengths = torch.from_numpy(call_function("list_value_length", [rows.data.column("ids")]).to_numpy().astype(np.int64))
    document = torch.from_numpy(rows.data.column("document").to_numpy().copy())
    more = {"labels": None, "label": None, "classes": 0} if views.pack else {"lengths": lengths}
    if source.labels is not None and not views.pack:
        more["labels"] = source.labels[document]
    name = f"{source.facts.get('path')} {'packed' if views.pack else 'cut'}"
    facts = source.facts | {"blocks": good, "tokens": int(lengths.sum())}
    return source._replace(
        rows=rows.select_columns(["ids"]), column="ids", names=False, parts=((name, 0),), total=good, facts=facts, **more
    )


def _read(path: Any) -> bytes:
    if not os.path.isfile(path):  # a pipe would block for ever
        raise Rejected("unreadable", "no such file")
    try:
        if (size := os.path.getsize(path)) > MAX_BYTES:
            raise Rejected("too_large", f"{size} bytes, at most {MAX_BYTES}; cut it into pieces")
        return Path(path).read_bytes()
    except OSError as error:
        raise Rejected("unreadable", str(error.strerror)) from None


@cache
def _hashing() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=4096, norm="l2")


# Blocks -------------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A piece of a document."""

    row: int
    text: str
    last: bool


def _cached(source: Any, tokenizer: Any, pack: bool, most: int) -> Any:
    """Rows `ids`, `document`, `bad`: blocks first, then "kind: reason" of each bad document, and a row for the end."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    def rows() -> Iterator[dict[str, Any]]:
        bad: list[tuple[int, Rejected]] = []
        documents = _documents(source, lambda texts: encode(tokenizer, texts), bad)
        begin, end = begin_id(tokenizer), end_id(tokenizer)
        for row, ids in _packed(documents, most - 1, end) if pack else _cut(documents, most - 2, begin, end):
            yield {"ids": ids, "document": row, "bad": None}
        for row, error in bad:
            yield {"ids": [], "document": row, "bad": f"{error.kind}: {error.reason}"}
        yield {"ids": [], "document": -1, "bad": "end"}  # `datasets` refuses to write nothing

    of = datasets.Features(
        {"ids": datasets.List(datasets.Value("int32")), "document": datasets.Value("int64"), "bad": datasets.Value("string")}
    )
    key = _fingerprint(source, tokenizer, pack, most)
    try:
        return datasets.Dataset.from_generator(rows, of, fingerprint=key)  # type: ignore[arg-type]
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _fingerprint(source: Any, tokenizer: Any, pack: bool, most: int) -> str:
    """Of all that blocks depend on. A folder's rows are names: files count as changed by their size and time."""
    from datasets.fingerprint import Hasher

    hasher = Hasher()
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    special = [tokenizer.pad_token_id, begin_id(tokenizer), end_id(tokenizer), tokenizer.mask_token_id]
    for part in (FORMAT, source.rows._fingerprint, source.column, source.root, vocabulary, special, pack, most):
        hasher.update(part)
    if source.names:
        for row in source.rows:
            hasher.update(_state(source, row))
    return hasher.hexdigest()


def _state(source: Any, row: Any) -> tuple[int, int] | None:
    try:
        found = os.stat(source.content(row))
    except (Rejected, OSError):
        return None
    return found.st_size, found.st_mtime_ns


def _documents(
    source: Any, encode: Callable[[list[str]], list[np.ndarray]], bad: list[tuple[int, Rejected]]
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, token ids) of each good document, tokenised many at a time; the others are added to `bad`."""
    ids: list[np.ndarray] = []
    for batch in _batches(_parts(source, bad)):
        for part, found in zip(batch, encode([part.text for part in batch])):
            ids.append(found)
            if part.last:
                whole, ids = np.concatenate(ids), []
                if len(whole):
                    yield part.row, whole
                else:
                    bad.append((part.row, Rejected("empty", "no token")))


def _parts(source: Any, bad: list[tuple[int, Rejected]]) -> Iterator[_Part]:
    for number, row in enumerate(source.rows):
        try:
            text = decode(source.content(row))
        except Rejected as error:
            bad.append((number, error))
            continue
        pieces = [*stretches(str(text), STRETCH)]
        for i, piece in enumerate(pieces, 1):
            yield _Part(number, piece, i == len(pieces))


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _packed(documents: Iterable[tuple[int, np.ndarray]], size: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of `size` tokens; a shorter one only if it is the only one and has two tokens besides the end."""
    rest, row, short = np.empty(0, np.int64), -1, True
    for row, ids in documents:
        rest = np.concatenate([rest, ids, [end]])
        full = len(rest) // size * size
        for block in rest[:full].reshape(-1, size):
            short = False
            yield row, block
        rest = rest[full:]
    if short and (rest != end).sum() > 1:
        yield row, rest


def _cut(documents: Iterable[tuple[int, np.ndarray]], size: int, begin: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each document in the fewest pieces of at most `size` tokens, equally long, with beginning and end."""
    for row, ids in documents:
        for piece in np.array_split(ids, -(-len(ids) // size)):
            yield row, np.concatenate([[begin], piece, [end]])
