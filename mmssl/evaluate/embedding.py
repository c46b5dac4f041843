"""Embeddings of a whole data set, in memory or on disk.

    features.parquet.parts/manifest.json       what is being written; another one is not gone on with
    features.parquet.parts/00000007.safetensors  a shard, whole or absent
    features.parquet                            all shards, row i of sample i; then the parts go

Shards are dealt to processes by number, and a batch never crosses one, so that any number of processes writes the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from mmssl.config import DataOptions
from mmssl.data.dataset import decoded, start_worker
from mmssl.data.sources import Source, open_source
from mmssl.distributed import gather_objects, launched_group, rank, world
from mmssl.errors import DataError, RankError, RecipeError
from mmssl.evaluate.features import BATCH, PADDED, PlainSet
from mmssl.evaluate.features import embed as embed_set
from mmssl.evaluate.probe import inputs_of, local_device, modality_of, open_data, open_model, pooled, runner
from mmssl.evaluate.tables import FORMATS, write_rows
from mmssl.evaluate.tokens import layer_means, read
from mmssl.model.encoder import mean_tokens
from mmssl.registry import Modality, Views
from mmssl.types import Rejected, View

TOKENS = ("pooled", "mean", "cls", "patch")  # and layer:K
DTYPES = {"float32": torch.float32, "float16": torch.float16}
WHERE = ("column", "label", "root", "config", "revision")


def embed(
    model: str | Path,
    data: str,
    out: str | Path | None = None,
    tokens: str = "pooled",
    dtype: str = "float32",
    split: str = "train",
    samples: int | None = None,
    shard: int = 2048,
    workers: int = 0,
    **options: Any,
) -> dict[str, Tensor] | Path:
    """Embeddings of the samples of a split.

    Args:
        model: folder, run folder or Hub id.  data: folder, table or Hub id.
        out: file to write, .parquet, .npy or .safetensors; beside the latter two `NAME.rows.csv` says what rows are. Row i is
            that of sample i: of one that cannot be read it is empty (parquet) or NaN, and the sample stands in
            `NAME.quarantine.jsonl`. What was interrupted goes on where it stopped. If None nothing is written.
        tokens: `pooled` (as the model pools, which probes measure), `mean` of content tokens, `cls`, `patch` (all content
            tokens) or `layer:K`, the mean of content after block K, from 1 or, from the end, -1.
        dtype: float32 or float16, of what is written.
        split: of the data.
        samples: only so many, spread evenly.
        shard: samples that are written at once.
        workers: processes that decode.
        options: `column`, `label`, `root`, `modality`, `config`, `revision`; `member` of a model of several kinds of data.
            Without `out`, `samples` is at most how many (labelled ones if there are any), 5 000 if unset.
    Returns: the file; without `out` `embedding` (N, D) and `label` (N,), -1 = unknown, on the CPU.
    Raises: RecipeError; DataError if no sample can be read.
    """
    network, place = open_model(model, options.pop("member", None))
    if out is None:
        if tokens != "pooled" or dtype != "float32":
            raise RecipeError("out: missing; tokens and dtype are those of a file, name it with out=features.parquet.")
        options = {"train": split} | options | ({} if samples is None else {"samples": samples})
        rows = embed_set(open_data(network, place, data, options)[0].train, runner(network))
        return {"embedding": rows["embedding"], "label": rows["label"]}
    _check(tokens, dtype, Path(out), shard, network)
    kind = modality_of(network, options.pop("modality", None))
    if unknown := {*options} - {*WHERE}:
        raise RecipeError(f"{min(unknown)}: unknown option; allowed are {', '.join(WHERE)}, modality and member.")
    try:
        views = kind.plain_views(network, place)
    except ValueError as error:
        raise RecipeError(f"{place}: {error}") from None
    where = DataOptions(path=data, modality=kind.name, split=split, limit=samples, **options)
    rows = Rows(open_source(where, kind, split), kind, views)
    facts = {
        **{"format": 1, "model": str(model), "weights": _fingerprint(network), "data": data, "split": split},
        **{"samples": rows.source.size, "names": _names(rows.source), "tokens": tokens, "dtype": dtype, "shard": shard},
        **{name: options.get(name) for name in WHERE},
    }
    with launched_group():
        return Writer(Path(out), facts, rows, network, workers).write()


@torch.no_grad()
def usable_rows(model: str | Path, source: Source, kind: Modality, member: str | None = None) -> tuple[list[int], Tensor]:
    """Positions of all samples that can be used, and (N, D) what a model pools of them.

    Raises: RecipeError if the model is of another kind of data; DataError if no sample can be used.
    """
    network, place = open_model(model, member)
    own = modality_of(network, kind.name)
    if own.decode is not kind.decode:
        raise RecipeError(f"model: {model} takes {own.name}, the data are {kind.name}.")
    rows, places, found = Rows(source, own, own.plain_views(network, place)), [], []
    network.to(local_device()).eval()
    for made in rows.batches(range(source.size)):
        if made["view"] is not None:
            inputs = inputs_of(made["view"], network)
            places += made["positions"]
            found.append(pooled(network(**inputs), made["view"], inputs, network).float().cpu())
    if not found:
        raise DataError(f"data: none of the {source.size} samples can be read, {source.identity(0)} for one.")
    if not bool((whole := torch.cat(found)).isfinite().all()):
        raise RecipeError(f"model: embeddings of {model} are not finite; the model has diverged.")
    return places, whole


class Rows(PlainSet):
    """All samples of a source, without stand-ins: those that cannot be used are named."""

    def __init__(self, source: Source, kind: Modality, views: Views):
        super().__init__(source, kind, views, [*range(source.size)])

    def batches(self, positions: range, workers: int = 0) -> Iterator[dict[str, Any]]:
        """What `collate` makes of them, views on the device of this process."""
        size, device = BATCH if self.views.longest is None else PADDED, local_device()
        keys = [[*positions[i : i + size]] for i in range(0, len(positions), size)]
        more = {"num_workers": workers if len(keys) > 1 else 0, "worker_init_fn": start_worker}
        for made in DataLoader(self, batch_sampler=keys, collate_fn=self.collate, **more):
            view = made["view"]
            if view is not None:
                pad = None if view.pad is None else view.pad.to(device)
                made["view"] = View(view.x.to(device), view.modality, pad)
            yield made

    def __getitem__(self, position: int) -> dict[str, Any]:
        """`position`, and the decoded `sample` or the `reason` why there is none."""
        index = self.indices[position]
        try:
            return {"position": position, "sample": decoded(self.kind, self.source.value(index))}
        except Rejected as bad:
            return {"position": position, "reason": str(bad)}

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`view` of those that can be used, None if there are none, their `positions`, and `bad`: position -> reason."""
        good = [sample for sample in samples if "sample" in sample]
        bad = {sample["position"]: sample["reason"] for sample in samples if "reason" in sample}
        try:
            view = self._view(good) if good else None
        except Rejected:
            for sample in [sample for sample in good if not self._fits(sample["sample"])]:
                good.remove(sample)
                bad[sample["position"]] = "too_short: without a single token"
            view = self._view(good) if good else None
        if view is not None and view.pad is not None and bool((empty := view.pad.all(1)).any()):
            bad |= {good[i]["position"]: "too_short: without a single token" for i in empty.nonzero().flatten().tolist()}
            good = [sample for sample in good if sample["position"] not in bad]
            view = self._view(good) if good else None
        return {"view": view, "positions": [sample["position"] for sample in good], "bad": bad}


class Writer:
    """The shards of one file.

    Args:
        facts: what must agree for a file that was begun to be gone on with.
        workers: processes that decode.
    """

    def __init__(self, out: Path, facts: dict[str, Any], rows: Rows, network: Any, workers: int):
        self.out, self.facts, self.rows, self.network, self.workers = out, facts, rows, network, workers
        self.parts = out.with_name(f"{out.name}.parts")
        self.size, self.shard = facts["samples"], facts["shard"]

    def write(self) -> Path:
        """All that is missing. On every rank, of which each has its own shards; the main one joins them."""
        together(self._begin)
        try:
            together(self._encode)
        except RecipeError:
            if not rank() and not any(self.parts.glob("[0-9]*")):  # such tokens there are not: other ones may be asked for
                shutil.rmtree(self.parts)
            raise
        together(self._join)
        return self.out

    def _begin(self) -> None:
        if rank():
            return
        manifest = self.parts / "manifest.json"
        if self.out.exists():
            raise RecipeError(f"out: {self.out} exists. Choose another file or remove it.")
        if manifest.is_file():
            begun = json.loads(manifest.read_text("utf-8"))
            other = [f"{name} was {begun.get(name)}, is {now}" for name, now in self.facts.items() if begun.get(name) != now]
            if other:
                raise RecipeError(
                    f"out: {self.out} was begun otherwise: {'; '.join(other)}. Finish it as it was begun, remove {self.parts}, "
                    "or choose another file."
                )
            return
        self.parts.mkdir(parents=True, exist_ok=True)
        aside = self.parts / ".manifest.json"
        aside.write_text(json.dumps(self.facts), encoding="utf-8")
        aside.replace(manifest)

    @torch.no_grad()
    def _encode(self) -> None:
        self.network.to(local_device()).eval()
        for number, first in list(enumerate(range(0, self.size, self.shard)))[rank() :: world()]:
            file = self.parts / f"{number:08d}.safetensors"
            if not file.is_file():
                tensors, bad = self._shard(range(first, min(first + self.shard, self.size)))
                aside = file.with_name(f".{file.name}")
                save_file(tensors, aside, {"bad": json.dumps(bad)})
                aside.replace(file)

    def _shard(self, positions: range) -> tuple[dict[str, Tensor], dict[int, str]]:
        """`embedding` (T, D), the rows of all usable samples one after the other, and `count` (n,), how many rows each has."""
        count, found, bad = torch.zeros(len(positions), dtype=torch.int64), [], {}
        for made in self.rows.batches(positions, self.workers):
            bad |= made["bad"]
            for position, row in zip(made["positions"], self._rows(made["view"]) if made["view"] is not None else ()):
                count[position - positions[0]] = len(row)
                found.append(self._cast(row, position))
        counts = count[count > 0]
        if self.out.suffix == ".npy" and len(counts.unique()) > 1:
            raise RecipeError("out: tokens=patch of samples of unlike length fit no .npy; write .parquet or .safetensors.")
        empty = torch.zeros(0, 0, dtype=DTYPES[self.facts["dtype"]])
        return {"embedding": torch.cat(found) if found else empty, "count": count}, bad

    def _rows(self, view: View) -> list[Tensor]:
        """(1, D) of each sample, or (L, D) for tokens=patch."""
        inputs, wanted = inputs_of(view, self.network), self.facts["tokens"]
        layer = int(wanted.partition(":")[2]) if wanted.startswith("layer:") else None
        out = self.network(**inputs, **({} if layer is None else {"output_hidden_states": True}))
        if wanted == "pooled":
            return [*pooled(out, view, inputs, self.network)[:, None].float().cpu()]
        parts = read(out, view, inputs, self.network)
        if wanted == "patch":
            return [tokens[valid] for tokens, valid in zip(parts.tokens.float().cpu(), parts.valid.cpu())]
        if wanted == "cls" and parts.cls is None:
            raise RecipeError(f"tokens: cls, which this {type(self.network).__name__} does not have; take mean or pooled.")
        if layer is not None and not (1 <= layer <= len(parts.layers) or -len(parts.layers) <= layer < 0):
            raise RecipeError(f"tokens: layer:{layer}, the model has 1 to {len(parts.layers)}.")
        if layer is not None:
            return [*layer_means(parts)[layer - 1 if layer > 0 else layer][:, None].float().cpu()]
        found = parts.cls if wanted == "cls" else mean_tokens(parts.tokens, ~parts.valid)
        assert found is not None
        return [*found[:, None].float().cpu()]

    def _cast(self, row: Tensor, position: int) -> Tensor:
        cast = row.to(DTYPES[self.facts["dtype"]])
        if not bool(cast.isfinite().all()):
            why = "float16 cannot hold it, take dtype=float32" if bool(row.isfinite().all()) else "the model has diverged"
            raise RecipeError(f"{self.rows.source.identity(position)}: its embedding is not finite; {why}.")
        return cast

    def _join(self) -> None:
        if rank():
            return
        files = sorted(self.parts.glob("[0-9]*.safetensors"))
        bad: dict[int, str] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                bad |= {int(position): reason for position, reason in json.loads(opened.metadata()["bad"]).items()}
        if len(bad) == self.size:
            first = self._line(0, bad)
            raise DataError(f"data: none of the {self.size} samples can be read; {first['identity']}: {first['reason']}.")

        def shards() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for file in files:
                tensors = load_file(file)
                yield tensors["embedding"].numpy(), tensors["count"].numpy()

        write_rows(self.out, shards, self.rows.source, self.facts["tokens"] == "patch")
        ledger = self.out.with_name(f"{self.out.name}.quarantine.jsonl")
        if bad:
            ledger.write_text("".join(json.dumps(self._line(place, bad)) + "\n" for place in sorted(bad)), encoding="utf-8")
        shutil.rmtree(self.parts)

    def _line(self, position: int, bad: dict[int, str]) -> dict[str, Any]:
        return {"row": position, "identity": self.rows.source.identity(position), "reason": bad[position]}


def together(part: Any) -> None:
    """Do a rank's part, and go on when all have done theirs. Raises: what a rank has met, on all of them."""
    error: Exception | None = None
    try:
        part()
    except Exception as problem:  # whatever it is, the other ranks must hear of it
        error = problem
    said = [told for told in gather_objects(None if error is None else f"{type(error).__name__}: {error}") if told]
    if error is not None:
        raise error
    if said:
        raise RankError(f"Another process has ended: {said[0]}")


def _check(tokens: str, dtype: str, out: Path, shard: int, network: Any) -> None:
    """Raises: RecipeError."""
    layer = tokens.removeprefix("layer:")
    if tokens not in TOKENS and not (tokens.startswith("layer:") and layer.lstrip("-").isdigit() and int(layer)):
        raise RecipeError(f"tokens: found {tokens!r}, allowed are {', '.join(TOKENS)} and layer:K, K from 1 or from -1.")
    if dtype not in DTYPES:
        raise RecipeError(f"dtype: found {dtype!r}, allowed are {' and '.join(DTYPES)}.")
    if out.suffix not in FORMATS:
        raise RecipeError(f"out: {out} ends in {out.suffix or 'nothing'}, allowed are {', '.join(FORMATS)}.")
    if shard < 1:
        raise RecipeError(f"shard: {shard}, must be at least 1.")


def _fingerprint(network: torch.nn.Module) -> str:
    """Of the weights: a run goes on, and its model changes under the same name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _names(source: Source) -> str:
    """Of the samples, by their names."""
    digest = hashlib.blake2b(digest_size=16)
    for index in range(source.size) if source.names else ():
        digest.update(source.identity(index).encode() + b"\0")
    return digest.hexdigest()
