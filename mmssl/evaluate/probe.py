"""How good a finished model is on labelled data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mmssl.config import DataOptions, WatchOptions, explain
from mmssl.data.sources import open_source
from mmssl.errors import RecipeError
from mmssl.evaluate import health
from mmssl.evaluate.attentive import Attentive
from mmssl.evaluate.dense import Dense, classes_of, open_masked, segmented, with_pixels
from mmssl.evaluate.features import Loaded, Sets, open_sets
from mmssl.evaluate.features import embed as embed_set
from mmssl.evaluate.knn import knn_accuracy
from mmssl.evaluate.layers import LAYER, layer_scores, projector_of
from mmssl.evaluate.linear import Linear, linear_accuracy
from mmssl.evaluate.pretext import pretext
from mmssl.evaluate.protocols import DENSE, Protocol, Rows, choose, measure
from mmssl.evaluate.tokens import is_ours, layer_means, read, valid_tokens
from mmssl.hub.export import member_folder
from mmssl.model.released import load_encoder, modality_of
from mmssl.types import Batch, View

MOVED = ("embedding", "cls", "tokens", "attend", "label", "index")  # rows that classifiers learn from
SAMPLES = 5000  # of each split at most, more than a run takes in between
TOKEN_BYTES = 8 << 30  # of tokens that are held at once


def open_data(
    model: torch.nn.Module, path: str | Path, data: str, options: dict[str, Any], few: tuple[float, int] | None = None
) -> tuple[Sets, DataOptions]:
    """The sets that a model is measured on, under the views that it was trained for.

    Args:
        path: folder or id of the model.
        options: `column`, `label`, `root`, `modality`, which are taken out, and those of `watch`.
        few: see `open_sets`.
    Raises: RecipeError.
    """
    kind = modality_of(model, options.pop("modality", None))
    try:
        own = {name: value for name, value in options.items() if name not in ("column", "label", "root")}
        watch = WatchOptions(**{"samples": SAMPLES, **own})
    except ValidationError as error:
        raise RecipeError("; ".join(explain(issue, WatchOptions) for issue in error.errors())) from None
    where = DataOptions(
        path=data, modality=kind.name, **{k: options.pop(k) for k in ("column", "label", "root") if k in options}
    )
    try:
        views = kind.plain_views(model, path)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    return open_sets(where, watch, kind, views, 0, few), where


def inputs_of(view: View, model: torch.nn.Module) -> dict[str, Tensor]:
    """What a model is called with: the plain view under the name of its main input, and where its padding is.

    Foreign models take the padding as `attention_mask` (B, L) int64, 1 = valid: over tokens, or over samples of sound, where
    the padding is taken to be the zeros at the end.
    """
    name = getattr(model, "main_input_name", "pixel_values")
    if view.pad is None:
        return {name: view.x}
    if is_ours(model):
        return {name: view.x, "pad": view.pad}
    if name != "input_values":
        return {name: view.x, "attention_mask": (~view.pad).long()}
    place = torch.arange(view.x.shape[1], device=view.x.device)
    last = (place * (view.x != 0)).amax(1, keepdim=True)
    return {name: view.x, "attention_mask": (place <= last).long()}


def pooled(out: Any, view: View, inputs: dict[str, Tensor], model: torch.nn.Module) -> Tensor:
    """(B, D): as the model pools, if it is ours or takes images; otherwise the mean of the valid tokens.

    What foreign speech and text models call pooler_output is trained for something else, or not at all.
    """
    own = getattr(out, "pooler_output", None)
    tokens = out.last_hidden_state
    if own is not None and (is_ours(model) or view.x.ndim == 4):
        return own.flatten(1)
    if view.pad is None:
        return tokens.flatten(2).mean(2) if tokens.ndim == 4 else tokens.mean(1).flatten(1)
    weights = valid_tokens(tokens, view, inputs, model).to(tokens).unsqueeze(-1)  # (B, L, 1)
    return (tokens * weights).sum(1) / weights.sum(1)


def open_model(model: str | Path, member: str | None) -> tuple[torch.nn.Module, str | Path]:
    """A model to measure and where it lies: that of a run folder, or of a member, if it is one of several kinds of data.

    Raises: RecipeError if it is left open which.
    """
    inner = Path(model) / "model"
    if not (Path(model) / "config.json").exists() and (inner / "config.json").is_file():
        model = inner
    network = load_encoder(model)
    members = getattr(network.config, "members", None) or {}
    if not members and member is None:
        return network, model
    if member is None or member not in members:
        raise RecipeError(
            f"member: {model} takes {' and '.join(members)}; say which with member=NAME."
            if members
            else f"member: {model} is a model of one kind of data; leave it out."
        )
    place = member_folder(model, member)
    return load_encoder(place), place


def local_device() -> str:
    """That of this process."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def runner(
    model: torch.nn.Module,
    cls_layers: int = 0,
    tokens: bool = False,
    layers: bool = False,
    projector: Callable[[Tensor], dict[str, Tensor]] | None = None,
) -> Any:
    """Function: flat batch -> pooled `embedding` (B, D), and what else is asked for.

    Args:
        cls_layers: `cls` (B, cls_layers, D), the class tokens of the last layers.
        tokens: `tokens` (B, L, D) of content and `attend` (B, L), 0 = padding.
        layers: `layer.1` (B, D) and so on, the mean of content after each block; and those of the projector, by name.
    """
    device = local_device()
    model.to(device).eval()
    states = {"output_hidden_states": True} if cls_layers or layers else {}

    def run(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        (view,) = Batch.from_tensors({name: tensor.to(device) for name, tensor in batch.items()}).views
        inputs = inputs_of(view, model)
        out = model(**inputs, **states)
        found = {"embedding": pooled(out, view, inputs, model)}
        if cls_layers:
            found["cls"] = cls_tokens(out, model, cls_layers)
        if tokens or layers:
            parts = read(out, view, inputs, model)
            found |= {"tokens": parts.tokens, "attend": parts.valid} if tokens else {}
            found |= {f"{LAYER}{i}": mean for i, mean in enumerate(layer_means(parts), 1)} if layers else {}
        if projector is not None:
            found |= {f"{LAYER}{name}": x for name, x in projector(found["embedding"].cpu()).items()}
        return found

    return run


def cls_tokens(out: Any, model: Any, layers: int) -> Tensor:
    """(B, layers, D): the cls tokens of the last layers, each through the norm at the end of the model, as in DINO.

    Layers that the model lacks are left out.
    """
    norm = model.encoder.transformer.norm
    return torch.stack([norm(tokens)[:, 0] for tokens in out.hidden_states[-layers:]], dim=1)


def _cls_layers(protocols: dict[str, Protocol], model: Any) -> int:
    """The most that a protocol takes. Raises: RecipeError if the model has no cls token."""
    taking = {name: p.cls_layers for name, p in protocols.items() if isinstance(p, Linear) and p.cls_layers}
    transformer = getattr(getattr(model, "encoder", None), "transformer", None)
    if taking and not (is_ours(model) and getattr(transformer, "extra_tokens", 0)):
        raise RecipeError(
            f"protocol: {', '.join(taking)} concatenates cls tokens, which this {type(model).__name__} does not have or does "
            "not show; dino-resnet takes pooled features."
        )
    return max(taking.values(), default=0)


def probe(
    model: str | Path,
    data: str,
    random: bool = False,
    seed: int = 0,
    group: str | None = None,
    protocol: str | Sequence[str] | None = None,
    labels: float | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    batch: int | None = None,
    augment: bool | None = None,
    metrics: bool = False,
    layers: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """k-NN and linear accuracy of frozen features, beside what raw values reach.

    Args:
        model: folder, run folder or Hub id.  data: labelled folder, table or Hub id.
        random: measure a freshly initialised model of the same shape as well; its weights are drawn from `seed`.
        seed: of that, of `labels`, and of the draws of protocols.
        group: column, such as the speaker, whose values are left out one by one in a further linear probe over both splits.
        protocol: names of `mmssl.evaluate.protocols.PROTOCOLS`, one, several or a comma list, in place of the usual linear
            probe.
        labels: learn from a class-balanced part of the training split only: a share below 1, or that many samples of each
            class. Parts of the same seed lie within each other.
        epochs, lr, batch, augment: in place of what the protocols say; `lr` before it is scaled with the batch.
            Without `augment` features are computed once and not for each epoch.
        metrics: measure what needs no classifier as well, on the training split: see `mmssl.evaluate.health`.
        layers: probe the output of every block as well, and of the projector where the model lies in its run folder.
        options: `train`, `test` (splits), `samples`, `neighbours`, `column`, `label`, `root`, `modality`; `member` of a model
            of several kinds of data.
    Returns: `{"raw": {"knn": x}, "random": {...}, "model": {"knn": x, "linear": x}}`, accuracies 0..1; with `group` also
        `left_out`, the mean accuracy on a value that the classifier has not seen, and `left_out_worst`, the least one. With
        `protocol`, models have `"protocols": {name: {"accuracy": x, ...}}` instead of linear, see `protocols.measure`; with
        `labels` there is `"labels": {"samples": n, "least": a, "most": b}`, how many samples of a class were learned from.
        With `layers`, `"layers": {"1": {"knn": x, "linear": x}, ..., "projector.1": {...}, "projector": {...}, "all": {...}}`,
        the last of all blocks side by side.
        With `protocol="dense"`, of images with masks, `miou` and `pixels`, see `dense.segmented`.
    Raises: RecipeError if the data have no labels, or an option is wrong.
    """
    k = int(options.get("neighbours", 20))
    changes = {"epochs": epochs, "lr": lr, "batch": batch, "augment": augment}
    if protocol is None and any(value is not None for value in changes.values()):
        name = next(name for name, value in changes.items() if value is not None)
        raise RecipeError(f"{name}: belongs to a protocol; choose one with protocol=NAME.")
    if protocol in (DENSE, [DENSE]):
        given = {"group": group, "labels": labels, "metrics": metrics, "layers": layers, **changes}
        return _dense(model, data, random, seed, [name for name, value in given.items() if value not in (None, False)], options)
    protocols = {} if protocol is None else choose(protocol, k, **changes)
    network, place = open_model(model, options.pop("member", None))
    wanted: dict[str, Any] = {**needs(protocols, network), "layers": layers}
    sets, where = open_data(network, place, data, options, None if labels is None else (labels, seed))
    if sets.test is None:
        raise RecipeError(f"data: {data} has no labels; name their column with label=COLUMN or use one folder for each class.")
    groups = [_groups(part, where, group) if group else None for part in (sets.train, sets.test)]
    results: dict[str, Any] = {}
    networks = {"model": network}
    if random:
        networks = {"random": untrained(network, seed), **networks}
    for name, candidate in networks.items():
        run = runner(candidate, **wanted, projector=projector_of(place) if layers and name == "model" else None)
        if wanted["tokens"]:
            check_room([sets.train, sets.test], run)
        bank, test = (embed_set(part, _with(run, values)) for part, values in zip((sets.train, sets.test), groups))
        check_rows(bank, test, f"{model}{' untrained' if name == 'random' else ''}", data)
        if "raw" not in results:
            centre = bank["raw"].mean(0)
            results["raw"] = {"knn": knn_accuracy(bank["raw"] - centre, bank["label"], test["raw"] - centre, test["label"], k)}
            if labels is not None:
                sizes = bank["label"].bincount()
                results["labels"] = {"samples": len(bank["label"]), "least": int(sizes.min()), "most": int(sizes.max())}
        features = bank["embedding"], bank["label"], test["embedding"], test["label"]
        results[name] = {"knn": knn_accuracy(*features, k)}
        if protocols:
            found = measured(protocols, sets, run, bank, test, seed)
            results[name]["protocols"] = {n: {k: v for k, v in one.items() if k != "right"} for n, one in found.items()}
        else:
            results[name]["linear"] = linear_accuracy(*features)
        if layers:
            results[name]["layers"] = layer_scores(bank, test, k)
        if metrics:
            results[name]["metrics"] = label_free(sets, runner(candidate), bank, seed)
        if group:
            both = {name: torch.cat([bank[name], test[name]]) for name in ("raw", "embedding", "label", "group")}
            if "left_out" not in results["raw"]:
                results["raw"] |= _left_out(both["raw"], both["label"], both["group"])
            results[name] |= _left_out(both["embedding"], both["label"], both["group"])
    return results


def check_rows(bank: Rows, test: Rows, model: str | Path, data: str) -> None:
    """Whether classifiers can learn from a model's embeddings of the training split. Raises: RecipeError."""
    if len(bank["label"].unique()) < 2:
        raise RecipeError(
            f"data: the training samples of {data} are of one class, and classifying takes two; see its labels (label=COLUMN)."
        )
    if not len(test["label"]):
        raise RecipeError(f"data: no test sample of {data} can be read.")
    check_finite([bank, test], model, data)


def check_finite(rows: Sequence[Rows], model: str | Path, data: str) -> None:
    """Whether a model's embeddings are numbers. Raises: RecipeError."""
    if not all(bool(one["embedding"].isfinite().all()) for one in rows):
        raise RecipeError(f"{model}: its embeddings of {data} are not finite; the model has diverged, take another checkpoint.")


def suite(model: str | Path, data: Sequence[str], **options: Any) -> dict[str, dict[str, Any]]:
    """What `probe` finds on each of several data sets, by their names; options are the same for all. Raises: RecipeError."""
    if len({*data}) < len(data):
        raise RecipeError("data: a set is given twice; name each once.")
    return {name: probe(model, name, **options) for name in data}


def untrained(network: Any, seed: int) -> Any:
    """A network of the same shape with weights drawn from `seed`.

    What was measured of data before training, which a module names in `measured`, belongs to the shape: without a palette the
    untrained network would see a single colour.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(network)(network.config)
    keep_measured(fresh, network)
    return fresh


def keep_measured(fresh: torch.nn.Module, network: torch.nn.Module) -> None:
    """Give a network what another of the same shape has measured of data."""
    for own, trained in zip(fresh.modules(), network.modules(), strict=True):
        for name in getattr(own, "measured", ()):
            getattr(own, name).copy_(getattr(trained, name))


def needs(protocols: dict[str, Protocol], network: Any) -> dict[str, Any]:
    """What `runner` must give for those protocols. Raises: RecipeError if the model cannot."""
    tokens = any(isinstance(p, Attentive) for p in protocols.values())
    return {"cls_layers": _cls_layers(protocols, network), "tokens": tokens}


def _dense(
    model: str | Path, data: str, random: bool, seed: int, wrong: list[str], options: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """`probe` of patches. wrong: options that were given and do not apply."""
    known = {"train": "train", "test": "test", "samples": SAMPLES, "modality": None, "member": None}
    if wrong := [*wrong, *(name for name in options if name not in (*known, "neighbours"))]:  # which always has a value
        raise RecipeError(f"{wrong[0]}: does not apply to protocol=dense, whose labels are masks; leave it out.")
    train, test, samples, modality, member = (options.get(name, default) for name, default in known.items())
    network, place = open_model(model, member)
    kind = modality_of(network, modality)
    sets = open_masked(data, kind, kind.plain_views(network, place), samples, train, test)
    networks = {"random": untrained(network, seed), "model": network} if random else {"model": network}
    results: dict[str, dict[str, float]] = {}
    for name, candidate in networks.items():
        run = with_pixels(runner(candidate, tokens=True))
        check_room(sets, run)
        rows = [embed_set(part, run) for part in sets]
        masks = [classes_of(part, one) for part, one in zip(sets, rows)]
        for which, part in (("raw", "pixels"), (name, "tokens")):
            if which not in results:
                results[which] = segmented(Dense(), rows[0][part], masks[0], rows[1][part], masks[1], seed)
    return results


def measured(
    protocols: dict[str, Protocol],
    sets: Sets,
    run: Any,
    bank: Rows,
    test: Rows,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """The protocols on the device that the model is on."""

    def moved(rows: Rows) -> dict[str, Tensor]:
        found = {name: rows[name].to(local_device()) for name in MOVED if name in rows}
        return found | ({"attend": found["attend"].bool()} if "attend" in found else {})

    def drawn(epoch: int) -> dict[str, Tensor]:
        return moved(embed_set(sets.train.drawn(seed, epoch), run))

    return measure(protocols, moved(bank), moved(test), sets.classes, seed, drawn)


def label_free(sets: Sets, run: Any, bank: Rows, seed: int) -> dict[str, float]:
    """Metrics of the training split and of two random views of it, with those that labels show where there are any."""
    plain, first, second = _shared(bank, *(embed_set(sets.train.drawn(seed, epoch), run) for epoch in range(2)))
    found = {**health.of_set(bank["embedding"]), **health.of_views(first, second, plain=plain), **pretext(sets, run, seed)}
    return found | (health.of_classes(bank["embedding"], bank["label"], seed) if sets.test is not None else {})


def check_room(sets: Sequence[Loaded | None], run: Any) -> None:
    """Whether all tokens can be held. Raises: RecipeError."""
    parts = [part for part in sets if part is not None]
    batch = next(iter(parts[0]))
    with torch.no_grad():
        found = run(batch)["tokens"]
    samples, each = sum(len(part.data) for part in parts), 4 * found[0].numel()
    if samples * each > TOKEN_BYTES:
        raise RecipeError(
            f"protocol: the tokens of all samples are held, {samples * each / 2**30:.0f} GiB here, and at most "
            f"{TOKEN_BYTES / 2**30:.0f}; give samples={TOKEN_BYTES // each // 2}."
        )


def _shared(*rows: Rows) -> list[Tensor]:
    """Embeddings of the samples that are in all: a random view may be refused, such as a crop without any sound."""
    common = set.intersection(*({*one["index"].tolist()} for one in rows))
    return [one["embedding"][[place for place, i in enumerate(one["index"].tolist()) if i in common]] for one in rows]


def _groups(part: Loaded, where: DataOptions, column: str) -> Tensor:
    """(n,): the number of each sample's group, -1 = none, for the whole split that `part` is drawn from."""
    source = open_source(where.model_copy(update={"label": column}), part.data.kind, part.data.source.facts["split"])
    if source.labels is None:
        raise RecipeError(f"group: {column!r} of {where.path} holds fewer than two values.")
    return source.labels


def _with(run: Any, groups: Tensor | None) -> Any:
    return run if groups is None else lambda batch: run(batch) | {"group": groups[batch["index"]]}


def _left_out(features: Tensor, labels: Tensor, groups: Tensor) -> dict[str, float]:
    """Linear accuracy on a group that the classifier has not seen: `left_out`, the mean over groups, and `left_out_worst`."""
    scores = [
        linear_accuracy(features[groups != g], labels[groups != g], features[groups == g], labels[groups == g])
        for g in groups.unique()
        if g >= 0
    ]
    return {"left_out": sum(scores) / len(scores), "left_out_worst": min(scores)}
