"""Evaluation protocols of papers, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.config import nearest
from mmssl.errors import RecipeError
from mmssl.evaluate.attentive import Attentive, attentive_right
from mmssl.evaluate.features import rank_in_class
from mmssl.evaluate.fewshot import FewShot, few_shot_right, over_draws
from mmssl.evaluate.knn import Knn, knn_rights
from mmssl.evaluate.linear import Heads, Linear, Logistic, logistic_path

Protocol = Knn | Linear | Logistic | Attentive | FewShot
Rows = Mapping[str, Tensor]

DENSE = "dense"  # of patches, see mmssl/evaluate/dense.py; it stands alone
HELD_OUT = 0.1  # of the training samples, where a protocol has to choose

PROTOCOLS: dict[str, Protocol] = {
    "knn": Knn(),  # as without a protocol
    "knn-dino": Knn((10, 20, 100, 200)),  # arXiv:2104.14294
    "knn-200": Knn((200,), 0.1),  # usual for CIFAR
    "moco": Linear((30.0,), falls=(0.6, 0.8)),  # v1 and v2, arXiv:1911.05722
    "simclr": Linear(  # arXiv:2002.05709, B.6, and its repository
        (0.1,), scaled=True, weight_decay=(1e-6,), batch=4096, epochs=90, nesterov=True, init_std=0.0
    ),
    "simclr-lbfgs": Logistic(tuple(10 ** (5 - 11 * i / 44) for i in range(45))),  # arXiv:2002.05709, B.8.1
    "byol": Linear((0.4, 0.3, 0.2, 0.1, 0.05), scaled=True, batch=1024, epochs=80, nesterov=True),  # arXiv:2006.07733, C.1
    "simsiam": Linear((0.1,), scaled=True, batch=4096, epochs=90, optimizer="larc"),  # arXiv:2011.10566
    "swav": Linear((0.3,), weight_decay=(1e-6,)),  # and DeepCluster v2; arXiv:2006.09882
    "barlow": Linear((0.3,), weight_decay=(1e-6,)),  # arXiv:2103.03230
    "vicreg": Linear((0.02,), weight_decay=(1e-6,)),  # arXiv:2105.04906
    "mocov3-resnet": Linear((0.1,), scaled=True, batch=1024, epochs=90),  # arXiv:2104.02057
    "mocov3-vit": Linear((3.0,), scaled=True, batch=1024, epochs=90),
    "dino": Linear((0.001,), scaled=True, batch=1024, cls_layers=4),  # ViT-S of arXiv:2104.14294
    "dino-resnet": Linear((0.3,), scaled=True, batch=1024),
    "mae-linear": Linear(  # arXiv:2111.06377, A.1
        (0.1,), scaled=True, batch=16384, epochs=90, optimizer="lars", warmup=10 / 90, norm=True
    ),
    "cifar": Linear((0.1,), scaled=True, batch=512, nesterov=True, init_std=0.0),  # README of google-research/simclr
    "solo-learn": Linear((0.1,), falls=(0.6, 0.8)),  # ImageNet-100 in vturrisi/solo-learn
    "lightly": Linear((0.1,), scaled=True, epochs=90),  # ImageNet in lightly-ai/lightly
    "grid": Linear(
        (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 8.0, 30.0), weight_decay=(0.0, 1e-6, 1e-4), augment=False
    ),  # blind to the scale of features
    "attentive": Attentive(),
    "few-1": FewShot(1),
    "few-5": FewShot(5),
    "few-10": FewShot(10),
}


def choose(names: str | Sequence[str], neighbours: int = 20, **changes: Any) -> dict[str, Protocol]:
    """The protocols of those names.

    Args:
        names: one, several, or a comma list.
        neighbours: k of `knn`.
        changes: `epochs`, `lr`, `batch`, `augment` in place of what trained protocols say; None leaves it.
    Raises: RecipeError naming what is wrong, with the nearest valid name.
    """
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in wanted:
        if name == DENSE:
            raise RecipeError("protocol: dense stands alone, and in mmssl probe only: its labels are masks.")
        if name not in PROTOCOLS:
            every = [*PROTOCOLS, DENSE]
            raise RecipeError(f"protocol: {name!r} is unknown{nearest(name, every)}; there are {', '.join(every)}.")
    for name, least in (("epochs", 1), ("batch", 1), ("lr", 0)):
        value = changes.get(name)
        if value is not None and not (value > 0 and least <= value < float("inf")):
            raise RecipeError(f"{name}: {value}, must be {'above 0' if name == 'lr' else 'at least 1'}.")
    changes = {name: value for name, value in changes.items() if value is not None}
    found = {name: PROTOCOLS[name] for name in wanted} | ({"knn": Knn((neighbours,))} if "knn" in wanted else {})
    for change in changes:
        if not any(_takes(protocol, change) for protocol in found.values()):
            raise RecipeError(f"{change}: none of {', '.join(wanted)} trains with it; leave it out.")
    return {name: _changed(p, changes) for name, p in found.items()}


def _takes(p: Protocol, change: str) -> bool:
    return isinstance(p, Linear | Attentive) and hasattr(p, change)


def _changed(p: Protocol, changes: Mapping[str, Any]) -> Protocol:
    own = {name: value for name, value in changes.items() if _takes(p, name)}
    if isinstance(p, Linear) and "lr" in own:
        own["lr"] = (own["lr"],)
    return replace(p, **own)


@torch.enable_grad()
def measure(
    protocols: Mapping[str, Protocol],
    bank: Rows,
    test: Rows,
    classes: int,
    seed: int = 0,
    drawn: Callable[[int], Rows] | None = None,
) -> dict[str, dict[str, Any]]:
    """Accuracy of frozen features under several protocols.

    Args:
        bank, test: `embedding` (N, D), `label` (N,), `index` (N,), `cls` (N, n, D) for those that take cls tokens, and
            `tokens` (N, L, D), `attend` (N, L) for attentive.
        seed: of first weights, of the order of samples, and of the training samples that are held out to choose by.
        drawn: epoch -> rows of the bank's samples under that epoch's views; the bank itself if None.
    Returns: for each `accuracy` 0..1 on `test`, `right` (N,), about which samples of it (of few-shots the share of draws), and
        what it was reached with; where there was a choice also `held_out`, the
        accuracy by which it was made, and `all`. `overridden` holds what the protocol says where it was changed.
    Raises: RecipeError if a protocol must choose and no class has two training samples.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, p in protocols.items():
        if isinstance(p, Knn):
            found[name] = _vote(p, bank, test)
        elif isinstance(p, Logistic):
            found[name] = _regress(p, bank, test, classes, _held(bank, name, seed))
        elif isinstance(p, Attentive):
            found[name] = {**_scored(attentive_right(p, bank, test, classes, seed)), **asdict(p)}
        elif isinstance(p, FewShot):
            right = few_shot_right(p, bank["embedding"], bank["label"], test["embedding"], test["label"], seed)
            _, low, high = over_draws(right)
            found[name] = {**_scored(right.double().mean(0)), "low": low, "high": high, **asdict(p)}
    trained = {name: p for name, p in protocols.items() if isinstance(p, Linear)}
    found |= _train(trained, bank, test, classes, seed, drawn)
    for name, p in protocols.items():
        changed = {key: value for key, value in asdict(PROTOCOLS[name]).items() if value != getattr(p, key)}
        found[name] |= {"overridden": changed} if changed and name != "knn" else {}
    return {name: found[name] for name in protocols}


def _scored(right: Tensor) -> dict[str, Any]:
    return {"accuracy": float(right.double().mean()), "right": right.tolist()}


def _vote(p: Knn, bank: Rows, test: Rows) -> dict[str, Any]:
    rights = knn_rights(bank["embedding"], bank["label"], test["embedding"], test["label"], p.neighbours, p.temperature)
    scores = {k: float(right.double().mean()) for k, right in rights.items()}
    best = max(scores, key=scores.__getitem__)
    more = {"all": [{"neighbours": k, "accuracy": score} for k, score in scores.items()]} if len(scores) > 1 else {}
    return {**_scored(rights[best]), "neighbours": best, "temperature": p.temperature, **more}


def _regress(p: Logistic, bank: Rows, test: Rows, classes: int, held: Tensor) -> dict[str, Any]:
    x, y = bank["embedding"], bank["label"]

    def right(fitted: tuple[Tensor, Tensor], features: Tensor, labels: Tensor) -> Tensor:
        return F.linear(features.double(), *fitted).argmax(1) == labels

    strengths = tuple(sorted(p.l2, reverse=True))
    path = logistic_path(x[~held], y[~held], classes, strengths)
    rows = [{"l2": l2, "held_out": float(right(one, x[held], y[held]).double().mean())} for l2, one in zip(strengths, path)]
    best = max(rows, key=lambda row: row["held_out"])
    (fitted,) = logistic_path(x, y, classes, (best["l2"],))  # now with the samples that were held out
    return {**_scored(right(fitted, test["embedding"], test["label"])), **best, "all": rows}


def _train(
    protocols: Mapping[str, Linear],
    bank: Rows,
    test: Rows,
    classes: int,
    seed: int,
    drawn: Callable[[int], Rows] | None,
) -> dict[str, dict[str, Any]]:
    """All at once, since the views of an epoch are what takes time."""
    nobody = torch.zeros_like(bank["label"], dtype=torch.bool)
    held = {n: _held(bank, n, seed) if len(p.lr) * len(p.weight_decay) > 1 else nobody for n, p in protocols.items()}
    heads = {name: Heads(p, int((~held[name]).sum()), _features(p, bank), classes, seed) for name, p in protocols.items()}
    for epoch in range(max((p.epochs for p in protocols.values()), default=0)):
        going = {name: p for name, p in protocols.items() if epoch < p.epochs}
        views = drawn(epoch) if drawn is not None and any(p.augment for p in going.values()) else bank
        for name, p in going.items():
            rows = views if p.augment else bank
            mine = ~torch.isin(rows["index"], bank["index"][held[name]])
            heads[name].train(_features(p, rows)[mine], rows["label"][mine], epoch)
    return {n: _report(p, heads[n], bank, test, held[n], drawn is not None) for n, p in protocols.items()}


def _report(p: Linear, heads: Heads, bank: Rows, test: Rows, held: Tensor, views: bool) -> dict[str, Any]:
    rows = [{"lr": lr, "weight_decay": decay} for lr, decay in heads.settings]
    right = heads.right(_features(p, test), test["label"])
    for row, accuracy in zip(rows, right.double().mean(0).tolist()):
        row["accuracy"] = accuracy
    best, more = rows[0], {}
    if len(rows) > 1:  # the test set has no say in the choice
        for row, accuracy in zip(rows, heads.accuracies(_features(p, bank)[held], bank["label"][held])):
            row["held_out"] = accuracy
        best, more = max(rows, key=lambda row: row["held_out"]), {"all": rows}
    told = {"epochs": p.epochs, "batch": p.batch, "augment": p.augment and views}
    return {**best, "right": right[:, rows.index(best)].tolist(), **told, **more}


def _features(p: Linear, rows: Rows) -> Tensor:
    """(N, D), or (N, n*D): the last n of the cls tokens."""
    return rows["cls"][:, -p.cls_layers :].flatten(1) if p.cls_layers else rows["embedding"]


def _held(bank: Rows, name: str, seed: int) -> Tensor:
    """(N,) bool: a tenth of each class, at least one sample of it unless it has no other."""
    classes, sizes = bank["label"].cpu(), bank["label"].bincount().cpu()
    most = (HELD_OUT * sizes).round().long().clamp(min=1).minimum(sizes - 1)
    held = (rank_in_class(classes, seed, "held-out") < most[classes]).to(bank["label"].device)
    if not bool(held.any()):
        raise RecipeError(f"protocol: {name} chooses on held-out training data, but no class has two samples; give labels=2.")
    return held
