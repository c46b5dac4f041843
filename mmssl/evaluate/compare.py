"""Which of several models is better, on the same samples, and whether the samples are enough to tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.evaluate.agreement import cka
from mmssl.evaluate.features import embed as embed_set
from mmssl.evaluate.intervals import Interval, interval, paired, resampled
from mmssl.evaluate.knn import knn_right
from mmssl.evaluate.linear import linear_right
from mmssl.evaluate.probe import (
    check_finite,
    check_room,
    check_rows,
    label_free,
    measured,
    modality_of,
    needs,
    open_data,
    open_model,
    runner,
)
from mmssl.evaluate.protocols import Rows, choose

MEASURES = {"linear": "linear", "knn": "k-NN"}  # by the names under which they are told
RIGHT = "right."  # before the name of a protocol, among test rows: about which samples it is right


KEPT = ("embedding", "label", "index")  # rows that judging takes


def compare(
    models: Sequence[str | Path],
    data: str,
    seed: int = 0,
    labels: float | None = None,
    metrics: bool = True,
    protocol: str | Sequence[str] | None = None,
    epochs: int | None = None,
    augment: bool | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Models side by side, by the same samples and classifiers.

    Args:
        models: two or more folders, run folders or Hub ids, of one kind of data and of any width.
        data: folder, table or Hub id; without labels there are no accuracies.
        seed: of bootstrap draws, random views and k-means.
        labels: learn from a class-balanced part of the training split, see `probe`.
        protocol, epochs, augment: measure as papers do instead of the logistic regression, see `probe`.
        metrics: whether to measure what needs no classifier, too; see `mmssl.evaluate.health`.
        options: as for `probe`: `train`, `test`, `samples`, `neighbours`, `column`, `label`, `root`, `modality`, `member`.
    Returns: `models`: name -> `knn` and `linear`, or protocols (`value`, `low`, `high`, 0..1), `metrics`, `parameters`,
        `width`; `pairs`: how much better the second of two is, with the interval of the difference by a paired bootstrap over
        test samples; `cka`: name -> name -> 0..1 on the training split; `samples` of both splits; `verdict`: a sentence for
        each pair.
    Raises: RecipeError if fewer than two are given, one is of another kind of data, or an option is wrong.
    """
    names = [str(model) for model in models]
    if len(names) < 2 or len({*names}) < len(names):
        raise RecipeError("compare: give two models or more, each once.")
    neighbours = int(options.get("neighbours", 20))
    protocols = {} if protocol is None else choose(protocol, neighbours, epochs=epochs, augment=augment)
    if protocol is None and (epochs is not None or augment is not None):
        raise RecipeError("epochs, augment: belong to a protocol; choose one with protocol=NAME.")
    member, kind = options.pop("member", None), options.pop("modality", None)
    opened = {name: open_model(name, member) for name in names}
    kinds = {name: modality_of(network, kind).name for name, (network, _) in opened.items()}
    for name, found in kinds.items():
        if found != kinds[names[0]]:
            raise RecipeError(f"{name} takes {found}, {names[0]} takes {kinds[names[0]]}; compare models of one kind of data.")
    few, rows, results = None if labels is None else (labels, seed), {}, {}
    for name, (network, place) in opened.items():
        sets, _ = open_data(network, place, data, {**options, "modality": kind}, few)
        if protocols and sets.test is None:
            raise RecipeError(f"protocol: {data} has no labels; leave it out, or name their column with label=COLUMN.")
        wanted = needs(protocols, network)
        run = runner(network, **wanted)
        if wanted["tokens"]:
            check_room([sets.train, sets.test], run)
        bank, test = embed_set(sets.train, run), embed_set(sets.test, run) if sets.test else None
        check_finite([part for part in (bank, test) if part is not None], name, data)
        if protocols and test is not None:
            check_rows(bank, test, name, data)
            found = measured(protocols, sets, run, bank, test, seed)
            test |= {f"{RIGHT}{p}": torch.tensor(one["right"]) for p, one in found.items()}
        rows[name] = bank, test
        weights = {id(p): p.numel() for p in network.parameters()}
        results[name] = {"parameters": sum(weights.values()), "width": bank["embedding"].shape[1]}
        if metrics:
            results[name]["metrics"] = label_free(sets, runner(network), bank, seed)
        network.cpu()
    found = judge(same_samples(rows), neighbours, seed, data)
    for name, scores in found.pop("models").items():
        results[name] = scores | results[name]
    return {"models": results, **found}


def same_samples(rows: Mapping[str, tuple[Rows, Rows | None]]) -> dict[str, tuple[Rows, Rows | None]]:
    """The samples that all models have embedded: a sound may be too short for one of them."""
    found: dict[str, list[Rows | None]] = {name: [] for name in rows}
    for parts in zip(*rows.values(), strict=True):
        known = [{*part["index"].tolist()} for part in parts if part is not None]
        common = set.intersection(*known) if known else set()
        for name, part in zip(rows, parts, strict=True):
            keep = None if part is None else torch.tensor([i in common for i in part["index"].tolist()], dtype=torch.bool)
            found[name].append(None if part is None else {n: part[n][keep] for n in part if n in KEPT or n.startswith(RIGHT)})
    return {name: (part[0] or {}, part[1]) for name, part in found.items()}


def judge(rows: Mapping[str, tuple[Rows, Rows | None]], neighbours: int, seed: int, data: str) -> dict[str, Any]:
    """What `compare` returns, but for what needs the models themselves.

    Args:
        rows: name -> training and test rows, the same samples of all; no test rows where there are no labels.
    """
    right: dict[str, dict[str, Tensor]] = {}
    for name, (bank, test) in rows.items():
        if test is not None:
            check_rows(bank, test, name, data)
            right[name] = right_of(bank, test, neighbours)
    bank, test = next(iter(rows.values()))
    near = {
        name: {other: alike(mine["embedding"], rows[other][0]["embedding"]) for other in rows}
        for name, (mine, _) in rows.items()
    }
    pairs = [
        {"first": first, "second": second}
        | {m: paired(one, right[second][m], seed)._asdict() for m, one in right[first].items()}
        for first, second in combinations(right, 2)
    ]
    return {
        "models": {name: scored(found, seed) for name, found in right.items()},
        "pairs": pairs,
        "cka": near,
        "samples": {"train": len(bank["index"]), "test": 0 if test is None else len(test["index"])},
        "verdict": [sentence(pair) for pair in pairs] or ["There are no labels to judge by."],
    }


def right_of(bank: Rows, test: Rows, neighbours: int) -> dict[str, Tensor]:
    """Measure -> (Q,) about which test samples it is right: protocols if they were measured, otherwise linear; and k-NN."""
    four = bank["embedding"], bank["label"], test["embedding"], test["label"]
    told = {name.removeprefix(RIGHT): rows for name, rows in test.items() if name.startswith(RIGHT)}
    return (told or {"linear": linear_right(*four)}) | {"knn": knn_right(*four, neighbours)}


def alike(x: Tensor, y: Tensor) -> float | None:
    """Linear CKA, see `agreement.cka`; None where one of both does not vary."""
    found = cka(x.double(), y.double())
    return found if math.isfinite(found) else None


def scored(right: Mapping[str, Tensor], seed: int) -> dict[str, Any]:
    """Accuracies with their intervals."""
    return {
        measure: interval(found.double().mean(), resampled(found[None], seed)[0])._asdict() for measure, found in right.items()
    }


def sentence(pair: Mapping[str, Any]) -> str:
    """Which of two is better by which measure, and which leaves it open, in points of accuracy."""
    measures = {name: MEASURES.get(name, name) for name in pair if name not in ("first", "second")}
    found = {name: Interval(*(100 * pair[measure][part] for part in Interval._fields)) for measure, name in measures.items()}
    decided = {name: one for name, one in found.items() if one.low > 0 or one.high < 0}
    gains: dict[tuple[str, str], list[str]] = {}  # better, other -> by how much
    for name, (value, low, high) in decided.items():
        order = (pair["second"], pair["first"]) if value > 0 else (pair["first"], pair["second"])
        low, high = (low, high) if value > 0 else (-high, -low)
        gains.setdefault(order, []).append(f"by {abs(value):.1f} points {name} (95 %: {low:.1f} to {high:.1f})")
    told = [f"{better} is better than {other} {' and '.join(how)}" for (better, other), how in gains.items()]
    left = {name: one for name, one in found.items() if name not in decided}
    if not decided:
        told.append(f"Whether {pair['second']} is better than {pair['first']} is open")
    told += [f"{name} leaves it open ({v:+.1f}, 95 %: {low:+.1f} to {high:+.1f})" for name, (v, low, high) in left.items()]
    return "; ".join(told) + "."
