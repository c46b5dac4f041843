"""What a run has gained: the model that it exports beside what it started from, by its own watch sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmssl.config import JointRecipe, Recipe, Settings
from mmssl.distributed import gather_objects, rank
from mmssl.errors import RecipeError
from mmssl.evaluate.collapse import effective_rank
from mmssl.evaluate.compare import MEASURES, alike, right_of, sentence
from mmssl.evaluate.features import Sets
from mmssl.evaluate.features import embed as embed_set
from mmssl.evaluate.intervals import paired
from mmssl.evaluate.probe import keep_measured
from mmssl.hub.export import load_weights, recommended, tensors_of, weights_of
from mmssl.training.launch import unpartitioned
from mmssl.training.objective import inside
from mmssl.training.saving import warn
from mmssl.training.trainer import SelfSupervisedTrainer
from mmssl.types import Batch

Measured = tuple[dict[str, Tensor], dict[str, Tensor] | None]  # rows of memory and test set
BEFORE, AFTER = "its start", "the trained model"


def change(
    trainer: SelfSupervisedTrainer, recipe: Settings, sets: Mapping[str, Sets | None], tensors: dict[str, Tensor]
) -> dict[str, float]:
    """Metrics `change/SET/...` of each member that is watched; a collective.

    Args:
        sets: of each member's probes; None where it has none.
        tensors: the method's, as a checkpoint holds them.
    Returns: of each measure, linear and k-NN, `_before`, `_after` (accuracies 0..1), `_gain`, `_low` and `_high` (its 95 %
        interval); `rank_before`, `rank_after` (effective rank) and `cka` of embeddings of the training split. Accuracies are
        missing without labels; all is, where embeddings are not finite.
    """
    with unpartitioned():
        encoders = _encoders(recipe, tensors)
    found = {}
    for name, (before, after) in encoders.items():
        own = sets[name]
        if own is not None:
            seed = recipe.train.seed
            rows = [_embedded(own, one, trainer) for one in (before, after)]
            part = _gains(own, rows[0], rows[1], recipe.members[name], seed)
            found |= {inside(metric, name): value for metric, value in part.items()}
    return found


def told(metrics: Mapping[str, Any]) -> str | None:
    """The metrics of `change` in a sentence for each set; None if there are none."""
    sets = dict.fromkeys(name.rsplit("/", 1)[0] for name in metrics if name.startswith("change/"))
    return (
        " ".join(_told({n.rsplit("/", 1)[1]: v for n, v in metrics.items() if n.startswith(f"{s}/")}, s) for s in sets) or None
    )


def _told(found: Mapping[str, Any], of: str) -> str:
    where = of.removeprefix("change/")
    if "linear_gain" not in found:
        return f"{where}: effective rank {found['rank_before']:.1f} before, {found['rank_after']:.1f} after."
    names = {"value": "gain", "low": "low", "high": "high"}
    pair = {m: {part: found[f"{m}_{name}"] for part, name in names.items()} for m in MEASURES}
    return f"{where}: {sentence({'first': BEFORE, 'second': AFTER, **pair})}"


def _encoders(recipe: Settings, tensors: dict[str, Tensor]) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Of each member the encoder that the run started from, and the one that it exports.

    Without those whose `model.init` can no longer be read: nothing else needs it once a run has begun.
    """
    of = {name: recommended(member) for name, member in recipe.members.items()}
    parts = tensors_of(recipe, tensors, of) if isinstance(recipe, JointRecipe) else {"": tensors}
    found, problems = {}, {}
    started, trained = _built(recipe), _built(recipe)
    for name, member in recipe.members.items():
        before, after = started[name], trained[name]
        try:
            if member.model.init:  # type: ignore[attr-defined]
                load_weights(before, member.model.init)  # type: ignore[attr-defined]
        except RecipeError as error:
            problems[name] = str(error)
        after.load_state_dict(weights_of(parts[name], of[name]))
        keep_measured(before, after)
        found[name] = before.eval(), after.eval()
    gone = {name: text for one in gather_objects(problems) for name, text in one.items()}  # for one rank, or for all
    for text in gone.values() if not rank() else ():
        warn(f"{text} The model is not compared with it (watch.change).")
    return {name: both for name, both in found.items() if name not in gone}


def _built(recipe: Settings) -> dict[str, Any]:
    """Encoders as a run begins with them."""
    methods = {"": recipe.build()} if isinstance(recipe, Recipe) else recipe.build()  # type: ignore[attr-defined]
    return {name: method.student.encoder for name, method in methods.items()}


def _embedded(sets: Sets, encoder: Any, trainer: SelfSupervisedTrainer) -> Measured:
    """Rows of both sets."""
    device = trainer.args.device
    encoder.to(device)

    def run(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        trainer.heed()
        (view,) = Batch.from_tensors({name: tensor.to(device) for name, tensor in batch.items()}).views
        return {"embedding": encoder.inspect(view)[0].float()}

    found = embed_set(sets.train, run), embed_set(sets.test, run) if sets.test else None
    encoder.cpu()
    return found


def _gains(sets: Sets, before: Measured, after: Measured, recipe: Recipe, seed: int) -> dict[str, float]:
    (bank, test), (later, later_test) = before, after
    every = [part["embedding"] for part in (bank, test, later, later_test) if part is not None]
    if not all(bool(rows.isfinite().all()) for rows in every):
        return {}
    found: dict[str, float | None] = {
        "rank_before": effective_rank(bank["embedding"]),
        "rank_after": effective_rank(later["embedding"]),
        "cka": alike(bank["embedding"], later["embedding"]),
    }
    if test is not None and later_test is not None and len(test["label"]) and len(bank["label"].unique()) > 1:
        k = recipe.watch.neighbours
        old, new = right_of(bank, test, k), right_of(later, later_test, k)
        for measure in MEASURES:
            gain = paired(old[measure], new[measure], seed)
            found |= {f"{measure}_before": float(old[measure].double().mean())}
            found |= {f"{measure}_after": float(new[measure].double().mean())}
            found |= {f"{measure}_gain": gain.value, f"{measure}_low": gain.low, f"{measure}_high": gain.high}
    return {f"change/{sets.name}/{name}": value for name, value in found.items() if value is not None}
