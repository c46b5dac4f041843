"""Calls of `datasets`, whose errors become one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import datasets.config

from mmssl.config import DataOptions
from mmssl.errors import MmsslError, RecipeError, storage_error

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would tell the Hub of every table that is opened, local ones too


def load_splits(options: DataOptions, *what: str | None, **more: Any) -> dict[str, Any]:
    """All splits by name."""
    load: Any = datasets.load_dataset
    with mended(options):
        return {str(name): rows for name, rows in load(*what, streaming=options.streaming, **more).items()}


@contextmanager
def mended(options: DataOptions) -> Iterator[None]:
    """One sentence instead of a traceback through `datasets`."""
    try:
        yield
    except MmsslError:
        raise
    except ConnectionError:
        raise RecipeError(
            f"data.path: {options.path} is no local path, and the Hub cannot be reached. Check the connection (and "
            "HF_HUB_OFFLINE), or give a local folder or table."
        ) from None
    except Exception as error:
        cause = error.__cause__ or error
        full = storage_error(cause, datasets.config.HF_DATASETS_CACHE)
        if full is not None:
            raise full from None
        key = "data.config" if re.search(r"[Cc]onfig name|BuilderConfig", str(cause)) else "data.path"
        raise RecipeError(f"{key}: {options.path} cannot be opened: {type(cause).__name__}: {one_line(cause)}") from None


def one_line(error: BaseException) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(str(error).split())[:500]
