"""How good a finished model is on labelled data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mmssl.config import DataOptions, WatchOptions, explain
from mmssl.errors import RecipeError
from mmssl.evaluate.features import Sets, open_sets
from mmssl.evaluate.features import embed as embed_set
from mmssl.evaluate.knn import knn_accuracy
from mmssl.evaluate.linear import linear_accuracy
from mmssl.hub.export import load_encoder
from mmssl.registry import modalities, modality


def _open(model: torch.nn.Module, path: str | Path, data: str, options: dict[str, Any]) -> Sets:
    name = getattr(model.config, "modality", None) or options.pop("modality", None) or modalities()[0]
    kind = modality(str(name))
    try:
        watch = WatchOptions(**{name: value for name, value in options.items() if name not in ("column", "label", "root")})
    except ValidationError as error:
        raise RecipeError("; ".join(explain(issue, WatchOptions) for issue in error.errors())) from None
    where = DataOptions(
        path=data, modality=kind.name, **{k: options.pop(k) for k in ("column", "label", "root") if k in options}
    )
    return open_sets(where, watch, kind, kind.plain_views(model, path), seed=0)


def _runner(model: torch.nn.Module) -> Any:
    """Flat batch -> pooled embedding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    keyword = getattr(model, "main_input_name", "pixel_values")

    def run(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = next(tensor for name, tensor in batch.items() if name.endswith(".x"))
        out = model(**{keyword: x.to(device)})
        pooled = getattr(out, "pooler_output", None)
        return {"embedding": (pooled if pooled is not None else out.last_hidden_state.mean(1)).flatten(1)}

    return run


def embed(model: str | Path, data: str, **options: Any) -> dict[str, Tensor]:
    """Embeddings of the `train` split of a data set.

    Args:
        model: folder or Hub id.  data: folder, table or Hub id.
        options: `train` (split), `samples` (at most), `column`, `label`, `root`.
    Returns: `embedding` (N, D) and `label` (N,), -1 = unknown, on the CPU.
    """
    network = load_encoder(model)
    rows = embed_set(_open(network, model, data, options).train, _runner(network))
    return {"embedding": rows["embedding"], "label": rows["label"]}


def probe(model: str | Path, data: str, random: bool = False, seed: int = 0, **options: Any) -> dict[str, dict[str, float]]:
    """k-NN and linear accuracy of frozen features, beside what raw values reach.

    Args:
        model: folder or Hub id.  data: labelled folder, table or Hub id.
        random: measure a freshly initialised model of the same shape as well; its weights are drawn from `seed`.
        options: `train`, `test` (splits), `samples`, `neighbours`, `column`, `label`, `root`.
    Returns: `{"raw": {"knn": x}, "random": {...}, "model": {"knn": x, "linear": x}}`, accuracies 0..1.
    Raises: RecipeError if the data have no labels.
    """
    network = load_encoder(model)
    k = int(options.get("neighbours", 20))
    sets = _open(network, model, data, options)
    if sets.test is None:
        raise RecipeError(f"data: {data} has no labels; name their column with label=COLUMN or use one folder for each class.")
    results: dict[str, dict[str, float]] = {}
    networks = {"model": network}
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks = {"random": type(network)(network.config), **networks}
    for name, candidate in networks.items():
        run = _runner(candidate)
        bank, test = embed_set(sets.train, run), embed_set(sets.test, run)
        if "raw" not in results:
            centre = bank["raw"].mean(0)
            results["raw"] = {"knn": knn_accuracy(bank["raw"] - centre, bank["label"], test["raw"] - centre, test["label"], k)}
        results[name] = {
            "knn": knn_accuracy(bank["embedding"], bank["label"], test["embedding"], test["label"], k),
            "linear": linear_accuracy(bank["embedding"], bank["label"], test["embedding"], test["label"]),
        }
    return results
