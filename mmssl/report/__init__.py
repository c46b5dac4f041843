"""`report/index.html` of a run folder, and one page of several runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmssl.config import Settings, load_recipe
from mmssl.errors import RecipeError
from mmssl.report.page import comparison, page
from mmssl.report.record import Record, read
from mmssl.training.run_folder import RunFolder, storing, write_atomic


def write(run: str | Path, recipe: Settings | None = None) -> Path:
    """Write, or write again, the report of a run folder, however its run ended.

    Args:
        recipe: of the run; read from its folder if unset.
    Returns: `report/index.html`.
    Raises: RecipeError if it is no run folder; StorageError if it cannot be written.
    """
    record = read(run)
    text = page(record, _differing(record, recipe))
    path = record.path / "report" / "index.html"
    with storing(path):
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, text)
    return path


def refresh(folder: RunFolder, recipe: Settings) -> None:
    """As `write`, while a run goes on: by the main process only, and an error is no more than a warning."""
    if not folder.is_main:
        return
    try:
        write(folder.path, recipe)
    except Exception as error:  # whatever it is, a page is not worth a run
        text = f"report/index.html could not be written: {type(error).__name__}: {error}"
        logging.getLogger("mmssl").warning(text)
        print(f"mmssl: note: {text}", file=sys.stderr)


def compare(runs: Sequence[str | Path], out: Path) -> Path:
    """One page with the curves of several runs. Raises: as `write`."""
    records = [read(run) for run in runs]
    with storing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, comparison(records, [_differing(record, None) for record in records]))
    return out


def _differing(record: Record, recipe: Settings | None) -> Mapping[str, Any] | None:
    """What a recipe sets otherwise than the defaults; None if it cannot be read, such as one of an older version."""
    if recipe is None:
        try:
            recipe = load_recipe(record.path / "config.yaml")
        except (RecipeError, OSError):
            return None
    return recipe.model_dump(mode="json", exclude_defaults=True)
