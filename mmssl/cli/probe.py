"""k-NN and linear accuracy of a model on labelled data

mmssl probe MODEL data=FOLDER freezes the model and classifies the `test` split by the features of the `train` split:
weighted 20-nearest-neighbour (cosine, temperature 0.07) and logistic regression on standardised features. If there is no
test split, a tenth is held out. Raw values are measured alongside.

protocol=NAME[,NAME...] measures as papers do, instead of the logistic regression: knn, knn-dino, knn-200, moco, simclr,
simclr-lbfgs, byol, simsiam, swav, barlow, vicreg, mocov3-resnet, mocov3-vit, dino, dino-resnet, mae-linear, cifar, solo-learn,
lightly, grid, attentive, few-1, few-5, few-10. Most of them encode the training samples anew in each epoch, under random crops:
augment=false encodes them once, epochs=N makes them shorter, and the output says what was changed. Compare numbers of the same
protocol only. Rates and batches of many are those of ImageNet: a small data set gives such a protocol few updates; grid finds a
rate by itself. attentive learns which tokens to look at; few-N classifies by the means of N samples a class, over 100 draws.

protocol=dense classifies patches: data=FOLDER has images/ and masks/, PNG files of the same names whose pixels are numbers of
classes (255 = not labelled), with or without splits in both; mean intersection by union and the share of right pixels.
"""

from __future__ import annotations

import json
from typing import Any

from mmssl.cli.options import parse

OPTIONS = {
    "data": (list, ..., "labelled folder, table or Hub id; given several times, one table of all"),
    "protocol": (str, None, "how papers measure; one or a comma list, see above"),
    "labels": (float, None, "learn from this share of the labels, or from so many samples of each class (1 or more)"),
    "epochs": (int, None, "instead of the protocol's"),
    "lr": (float, None, "instead of the protocol's, before it is scaled with the batch"),
    "batch": (int, None, "instead of the protocol's"),
    "augment": (bool, None, "random views of the training samples in each epoch, instead of the protocol's choice"),
    "random": (bool, False, "measure a freshly initialised model of the same shape as well"),
    "seed": (int, 0, "of the freshly initialised model, of labels, and of the protocols' draws"),
    "train": (str, "train", "split that is remembered"),
    "test": (str, "test", "split that is classified"),
    "samples": (int, 5000, "at most this many samples of each split"),
    "neighbours": (int, 20, "k of the nearest-neighbour vote"),
    "column": (str, None, "column of the data, found by name if unset"),
    "label": (str, None, "column of the labels, found by name if unset"),
    "root": (str, None, "folder that names in a table are relative to"),
    "member": (str, None, "whose encoder, of a model of several kinds of data"),
    "modality": (str, None, "kind of data, found by the model's input if unset"),
    "group": (
        str,
        None,
        "column whose values, such as speakers, are left out one by one in a linear probe: mean and worst",
    ),
    "layers": (bool, False, "probe every block as well, and the projector if the model lies in its run folder"),
    "metrics": (bool, False, "label-free metrics of the training split and of random views of it, retrieval and clustering"),
    "json": (bool, False, "print JSON"),
}


NAMES = {
    **{"knn": "k-NN", "linear": "linear", "left_out": "left out", "left_out_worst": "worst"},
    **{"miou": "mIoU", "pixels": "pixels"},
}


def run(arguments: list[str]) -> int:
    """`mmssl probe MODEL data=...`."""
    given = parse(arguments, ("MODEL",), OPTIONS)
    as_json = given.pop("json")
    from mmssl.evaluate.probe import probe, suite

    given = {name: value for name, value in given.items() if value is not None}
    model, data = given.pop("model"), given.pop("data")
    results = probe(model, *data, **given) if len(data) == 1 else suite(model, data, **given)
    show = table if len(data) == 1 else tables
    print(json.dumps(results) if as_json else show(results))
    return 0


def tables(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row for each set of data, a column for each accuracy of each network, and their means."""
    columns = {name: _accuracies(results) for name, results in found.items()}
    heads = [*dict.fromkeys(head for cells in columns.values() for head in cells)]
    width = max(map(len, (*found, "mean")))
    rows = [f"{'':{width}}" + "".join(f"{head:>{len(head) + 3}}" for head in heads)]
    means = {head: [cells[head] for cells in columns.values() if head in cells] for head in heads}
    columns["mean"] = {head: sum(values) / len(values) for head, values in means.items()}
    for name, cells in columns.items():
        text = (f"{f'{cells[head]:.1%}' if head in cells else '-':>{len(head) + 3}}" for head in heads)
        rows.append(f"{name:{width}}" + "".join(text))
    return "\n".join(rows)


def _accuracies(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Such as `model linear`, `model few-5`."""
    found = {}
    for network in ("raw", "random", "model"):
        scores = results.get(network, {})
        found |= {f"{network} {name}": scores[key] for key, name in NAMES.items() if key in scores}
        found |= {f"{network} {name}": one["accuracy"] for name, one in scores.get("protocols", {}).items()}
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Rows raw, random, model; columns k-NN, linear and, if measured, linear on groups left out. Then a row per protocol."""
    names = {key: name for key, name in NAMES.items() if any(key in scores for scores in results.values())}
    rows = [f"{'':14}" + "".join(f"{name:>10}" for name in names.values())]
    for name, scores in results.items():
        if scores.keys() & names.keys():
            cells = (f"{scores[key]:.1%}" if key in scores else "-" for key in names)
            rows.append(f"{name:14}" + "".join(f"{cell:>10}" for cell in cells))
    measured = {name: scores["protocols"] for name, scores in results.items() if "protocols" in scores}
    if measured:
        rows += ["", f"{'protocol':14}" + "".join(f"{name:>10}" for name in measured)]
        for protocol, found in measured["model"].items():
            cells = "".join(f"{scores[protocol]['accuracy']:>10.1%}" for scores in measured.values())
            rows.append(f"{protocol:14}{cells}  {_told(found)}")
    layers = {name: scores["layers"] for name, scores in results.items() if "layers" in scores}
    if layers:
        heads = [f"{name} {head}" for name in layers for head in ("k-NN", "linear")]
        rows += ["", f"{'layer':14}" + "".join(f"{head:>16}" for head in heads)]
        for layer in dict.fromkeys(layer for found in layers.values() for layer in found):
            scores = (found.get(layer, {}).get(key) for found in layers.values() for key in ("knn", "linear"))
            rows.append(f"{layer:14}" + "".join(f"{'-' if s is None else f'{s:.1%}':>16}" for s in scores))
    told = {name: scores["metrics"] for name, scores in results.items() if "metrics" in scores}
    if told:
        rows += ["", f"{'metric':20}" + "".join(f"{name:>10}" for name in told)]
        names = dict.fromkeys(name for found in told.values() for name in found)
        rows += [
            f"{name.replace('_', ' '):20}" + "".join(f"{f[name]:>10.4g}" if name in f else f"{'-':>10}" for f in told.values())
            for name in names
        ]
    if "labels" in results:
        n, least, most = results["labels"].values()
        each = f"{least}" if least == most else f"{least} to {most}"
        rows += ["", f"learned from {n} labels, {each} of each class"]
    return "\n".join(rows)


def _told(found: dict[str, Any]) -> str:
    """What an accuracy was reached with, what was chosen from how many, and what the protocol says otherwise."""
    said = {"neighbours": "k", "temperature": "T", "weight_decay": "decay"}
    names = ("neighbours", "temperature", "l2", "shots", "draws", "lr", "weight_decay", "epochs", "batch", "augment")
    text = ", ".join(f"{said.get(name, name)} {_number(found[name])}" for name in names if name in found)
    if "low" in found:
        text += f"; 95 % {found['low']:.1%} to {found['high']:.1%}"
    if "all" in found:
        text += f"; best of {len(found['all'])}" + (" on held-out training data" if "held_out" in found else "")
    changed = ", ".join(f"{said.get(n, n)} {_number(v)}" for n, v in found.get("overridden", {}).items())
    return text + (f"; NOT the protocol's {changed}" if changed else "")


def _number(value: Any) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return " | ".join(str(v).lower() if isinstance(v, bool) else f"{v:g}" for v in values)
