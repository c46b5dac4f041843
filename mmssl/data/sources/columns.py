"""Which column of a table holds the data, which one the labels, and what classes these name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from mmssl.config import DataOptions
from mmssl.errors import RecipeError
from mmssl.registry import Modality

LABELS = ("label", "labels", "class", "fine_label", "category", "target")  # usual names of label columns


def columns_of(rows: Any) -> Mapping[str, Any]:
    """Columns and their types; a stream of csv tells them only by its first rows."""
    return rows.features or datasets.Dataset.from_list(list(rows.take(100))).features


def media_column(features: Mapping[str, Any], options: DataOptions, kind: Modality) -> str:
    """The column of the data: the one named, or the first usual one."""
    wanted = [options.column] if options.column else kind.columns
    for name in wanted:
        if name in features:
            if not _usable(features[name]):
                raise RecipeError(
                    f"data.column: {name!r} of {options.path} holds {features[name]}, not files, bytes or text. "
                    f"Choose one of {', '.join(features)} with data.column=."
                )
            return name
    raise RecipeError(
        f"data.column: {options.path} has no column {' or '.join(map(repr, wanted))}; its columns are {', '.join(features)}. "
        "Choose one with data.column=."
    )


def _usable(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return hasattr(feature, "decode") or (isinstance(feature, dict) and "bytes" in feature)


def label_column(features: Mapping[str, Any], options: DataOptions, column: str) -> str | None:
    """The label column: the one named, or the first usual one that holds classes."""
    if options.label is None:
        return next(
            (name for name in LABELS if name in features and name != column and _is_class(features[name], options)), None
        )
    if options.label not in features:
        raise RecipeError(f"data.label: {options.path} has no column {options.label!r}; its columns are {', '.join(features)}.")
    if not _is_class(features[options.label], options):
        raise RecipeError(
            f"data.label: {options.label!r} holds {features[options.label]}, not classes. Labels are names or whole numbers; "
            "those of a stream must be a ClassLabel, since its classes are not known beforehand (or set data.streaming=false)."
        )
    return options.label


def _is_class(feature: Any, options: DataOptions) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    countable = ("string", "large_string", "bool", "int", "uint")
    return not options.streaming and isinstance(feature, datasets.Value) and feature.dtype.rstrip("0123456789") in countable


def classes_of(
    options: DataOptions, label: str | None, features: Mapping[str, Any], every: list[Any]
) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes, and label value -> number; of all splits, so that a class has one number in each."""
    if label is None:
        return [], {}
    if isinstance(features[label], datasets.ClassLabel):
        return list(features[label].names), {i: i for i in range(features[label].num_classes)}
    values = {value for rows in every for value in rows.unique(label)} - {None}
    if features[label].dtype.startswith("int"):
        values = {value for value in values if value >= 0}  # -1 means unlabelled
    try:
        found = sorted(values)
    except TypeError:
        raise RecipeError(f"data.label: {label!r} has another type in each split of {options.path}; make them agree.") from None
    if len(found) < 2:
        if options.label is not None:
            raise RecipeError(f"data.label: {label!r} of {options.path} holds fewer than two classes; leave it out.")
        return [], {}
    return [str(value) for value in found], {value: i for i, value in enumerate(found)}
