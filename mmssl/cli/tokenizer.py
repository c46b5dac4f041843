"""learn a vocabulary: mmssl tokenizer train data=TEXTS out=FOLDER

TEXTS is a folder, table or Hub id, as in a recipe. FOLDER gets a tokenizer that AutoTokenizer loads and that a recipe names
with views.tokenizer=FOLDER. The same texts give the same vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmssl.cli.options import nearest, parse
from mmssl.errors import DataError, RecipeError

OPTIONS = {
    "data": (str, ..., "folder, table or Hub id of texts"),
    "out": (Path, ..., "folder to write"),
    "vocab": (int, 8000, "size of the vocabulary, with five special tokens"),
    "kind": (("unigram", "bpe"), "unigram", "how a word is cut: by likelihood or by merges"),
    "column": (str, None, "column of the texts, found by name if unset"),
    "split": (str, "train", "split to learn from"),
    "limit": (int, None, "learn from only this many texts, spread evenly"),
    "overwrite": (bool, False, "replace an earlier tokenizer in FOLDER"),
}


def run(arguments: list[str]) -> int:
    """`mmssl tokenizer train`."""
    given = parse(arguments, ("WHAT",), OPTIONS)
    if given["what"] != "train":
        raise RecipeError(f"tokenizer: found {given['what']!r}{nearest(given['what'], ['train'])}, expected train.")
    folder = given["out"].expanduser()
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"out: {folder} is a file. Choose a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not given["overwrite"]:
        raise RecipeError(f"out: {folder} is not empty. Choose another folder, or add overwrite=true.")
    from mmssl.training.run_folder import storing

    texts = Texts(given)
    # The core names no modality's package: that of the features leads to the functions beside them.
    package = texts.kind.features.__module__.rpartition(".")[0]
    try:
        with storing(folder):
            importlib.import_module(f"{package}.tokenizer").train(texts, given["kind"], given["vocab"], folder)
    except ValueError as error:
        raise RecipeError(f"{error}.") from None
    finally:
        if texts.bad:
            print(f"passed over {len(texts.bad)} of {texts.source.size} texts, the first is {texts.bad[0]}")
    print(f"wrote {folder}; use it with: views.tokenizer={folder}")
    return 0


class Texts:
    """The texts of a source. Those that cannot be read are passed over and named in `bad`."""

    def __init__(self, given: dict[str, Any]):
        """Raises: RecipeError if there is no such source."""
        from pydantic import ValidationError

        from mmssl.config import DataOptions, explain
        from mmssl.data.sources import open_source
        from mmssl.registry import modality

        self.kind = modality("text")
        words = {"path": given["data"], "column": given["column"], "limit": given["limit"], "modality": "text"}
        try:
            self.source = open_source(DataOptions(**words), self.kind, given["split"])
        except ValidationError as error:
            raise RecipeError("; ".join(explain(issue, DataOptions) for issue in error.errors())) from None
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[str]:
        """Raises: DataError if none can be read."""
        from mmssl.types import Rejected

        for index in range(self.source.size):
            try:
                yield self.kind.decode(self.source.value(index))
            except Rejected as error:
                self.bad.append(f"{self.source.identity(index)} ({error})")
        if len(self.bad) == self.source.size:
            raise DataError("data: no text can be read.")
