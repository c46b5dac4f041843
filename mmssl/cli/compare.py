"""which of several models is better: mmssl compare A B [C ...] data=FOLDER

Models (run folders, model folders, Hub ids) of one kind of data, of any width, on the same samples: k-NN and logistic
regression as `mmssl probe` has them, each with its 95 % interval, and for each pair the interval of the difference, by a
bootstrap that draws the same test samples for both. Label-free metrics, likeness of features (linear CKA), parameters; a
sentence for each pair. Without labels there are metrics and CKA only. Intervals are about the test samples, not about another
seed of training. protocol=NAME[,NAME...] measures as papers do instead of the logistic regression, see `mmssl probe --help`.
"""

from __future__ import annotations

import json
from typing import Any

from mmssl.cli.options import parse
from mmssl.cli.probe import OPTIONS as PROBE

SAME = ("train", "test", "samples", "neighbours", "column", "label", "root", "member", "modality")
OPTIONS = {
    "data": (str, ..., "labelled folder, table or Hub id"),
    "labels": PROBE["labels"],
    "seed": (int, 0, "of bootstrap draws, random views and k-means"),
    **{name: PROBE[name] for name in SAME},
    **{name: PROBE[name] for name in ("protocol", "epochs", "augment")},
    "metrics": (bool, True, "what needs no classifier, too"),
    "json": (bool, False, "print JSON"),
}


def run(arguments: list[str]) -> int:
    """`mmssl compare A B data=...`."""
    given = parse(arguments, ("MODEL ...",), OPTIONS)
    as_json, models = given.pop("json"), given.pop("model")
    from mmssl.evaluate.compare import compare

    found = compare(models, given.pop("data"), **{name: value for name, value in given.items() if value is not None})
    print(json.dumps(found) if as_json else table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    """A column for each model, the verdict below."""
    models = found["models"]
    letters = {name: chr(ord("A") + i) if len(models) <= 26 else str(i) for i, name in enumerate(models)}
    rows = [f"{letter}  {name}" for name, letter in letters.items()]
    rows += ["", f"{'':20}" + "".join(f"{letter:>24}" for letter in letters.values())]
    scored = [name for name, value in next(iter(models.values())).items() if isinstance(value, dict) and "value" in value]
    for measure in sorted(scored, key=lambda name: name != "knn"):
        cells = (_share(scores[measure]) for scores in models.values())
        rows.append(f"{'k-NN' if measure == 'knn' else measure:20}" + "".join(f"{cell:>24}" for cell in cells))
    for what in ("parameters", "width"):
        rows.append(f"{what:20}" + "".join(f"{scores[what]:>24,}" for scores in models.values()))
    names = dict.fromkeys(name for scores in models.values() for name in scores.get("metrics", {}))
    for name in names:
        cells = (scores["metrics"].get(name) for scores in models.values())
        rows.append(f"{name.replace('_', ' '):20}" + "".join(f"{'-' if c is None else f'{c:.4g}':>24}" for c in cells))
    for name, near in found["cka"].items():
        rows.append(
            f"{'CKA with ' + letters[name]:20}" + "".join(f"{'-' if v is None else f'{v:.3f}':>24}" for v in near.values())
        )
    seen = found["samples"]
    rows += ["", f"{seen['train']} training samples" + (f", {seen['test']} test samples" if seen["test"] else "")]
    return "\n".join([*rows, *found["verdict"]])


def _share(score: dict[str, float]) -> str:
    return f"{score['value']:.1%} ({score['low']:.1%}..{score['high']:.1%})"
