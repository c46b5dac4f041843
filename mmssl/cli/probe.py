"""k-NN and linear accuracy of a model on labelled data

mmssl probe MODEL data=FOLDER freezes the model and classifies the `test` split by the features of the `train` split:
weighted 20-nearest-neighbour (cosine, temperature 0.07) and logistic regression on standardised features. If there is no
test split, a tenth is held out. Raw values are measured alongside.
"""

from __future__ import annotations

import json

from mmssl.cli.options import parse

OPTIONS = {
    "data": (str, ..., "labelled folder, table or Hub id"),
    "random": (bool, False, "measure a freshly initialised model of the same shape as well"),
    "seed": (int, 0, "of the freshly initialised model"),
    "train": (str, "train", "split that is remembered"),
    "test": (str, "test", "split that is classified"),
    "samples": (int, 5000, "at most this many samples of each split"),
    "neighbours": (int, 20, "k of the nearest-neighbour vote"),
    "column": (str, None, "column of the data, found by name if unset"),
    "label": (str, None, "column of the labels, found by name if unset"),
    "root": (str, None, "folder that names in a table are relative to"),
    "modality": (str, None, "kind of data, found by the model's input if unset"),
    "group": (str, None, "column whose values, such as speakers, are left out one by one in a further linear probe"),
    "json": (bool, False, "print JSON"),
}


def run(arguments: list[str]) -> int:
    """`mmssl probe MODEL data=...`."""
    given = parse(arguments, ("MODEL",), OPTIONS)
    as_json = given.pop("json")
    from mmssl.evaluate.probe import probe

    results = probe(given.pop("model"), given.pop("data"), **{n: v for n, v in given.items() if v is not None})
    print(json.dumps(results) if as_json else table(results))
    return 0


def table(results: dict[str, dict[str, float]]) -> str:
    """Rows raw, random, model; columns k-NN, linear and, if measured, linear with a group left out."""
    names = {"knn": "k-NN", "linear": "linear", "left_out": "left out"}
    names = {key: name for key, name in names.items() if any(key in scores for scores in results.values())}
    rows = [f"{'':14}" + "".join(f"{name:>10}" for name in names.values())]
    for name, scores in results.items():
        cells = (f"{scores[key]:.1%}" if key in scores else "-" for key in names)
        rows.append(f"{name:14}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(rows)
