"""What a run finds out about its student in between: probes on held-out data, descriptions of all samples."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

from mmssl import random
from mmssl.config import Recipe
from mmssl.data.sources import Source
from mmssl.evaluate import collapse, health, knn
from mmssl.evaluate.features import Loaded, PlainSet, Sets, embed, held_out, open_sets
from mmssl.registry import Modality, Views
from mmssl.training.objective import Objective, called, inside
from mmssl.training.run_folder import RunFolder
from mmssl.training.survey import Survey
from mmssl.training.trainer import SelfSupervisedTrainer

THIN = 1.5  # effective dimensions of local features below which a run is warned


class Probes:
    """The sets of `watch`, and what the student makes of them."""

    def __init__(self, recipe: Recipe, kind: Modality, views: Views, streaming: bool, folder: RunFolder, member: str = ""):
        self.recipe, self.folder = recipe, folder
        self.member = member  # name of the kind of data, where a run has several
        self.sets: Sets | None = None
        self.warned = False
        self.bound: tuple[str, dict[str, torch.Tensor]] | None = None  # name and rows of what was measured last, of pairs
        if not streaming or recipe.watch.path:
            self.sets = open_sets(recipe.data, recipe.watch, kind, views, recipe.train.seed)

    def labels(self, data: Survey) -> tuple[int, Source]:
        """Classes of the online linear probe, 0 for none, and the data with the labels that it may learn from."""
        source = data.source
        if not self.recipe.watch.linear or source.labels is None or self.sets is None or self.sets.test is None:
            return 0, source
        measured = self.sets.test.data.source
        if measured.facts.get("classes") != source.facts.get("classes"):
            return 0, source  # of another data set, with other classes
        if self.sets.name != "heldout":
            return source.classes, source
        if self.recipe.data.limit is not None or not data.same_rows:
            return 0, source  # the held-out samples are not to be found among these
        labels = source.labels.clone()
        labels[held_out(source, self.recipe.train.seed)] = -1
        return source.classes, source._replace(labels=labels)

    def names(self, objective: Objective) -> list[str]:
        """Of the metrics that `measure` gives; of few samples some may be undefined."""
        if self.sets is None:
            return []
        found = [f"health/{name}" for name in (*health.OF_SET, "feature_rankme")]
        if self.sets.test is not None:
            measures = ["knn"] + ["linear"] * (objective.probe is not None)
            found += [f"probe/{self.sets.name}/{name}" for name in measures]
        return [inside(name, self.member) for name in found]

    def measure(self, trainer: SelfSupervisedTrainer, objective: Objective) -> dict[str, float]:
        """Metrics of the student on the sets of `watch`; a collective. Raises: Interrupted if a rank has heard a signal."""
        if self.sets is None:
            return {}
        model: Any = trainer.model_wrapped
        was_training = model.training
        model.eval()

        def run(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            trainer.heed()
            inputs = {name: tensor for name, tensor in batch.items() if name not in ("raw", "valid", "label")}
            return model(trainer._prepare_inputs(called(inputs, self.member)))

        with trainer.compute_loss_context_manager():
            bank = embed(self.sets.train, run)
            if objective.probe is not None:
                objective.standardise.calibrate(bank["embedding"])
            test = embed(self.sets.test, run) if self.sets.test else None
        model.train(was_training)
        if "bound" in bank:
            self.bound = (self.sets.name, test) if test is not None else (self.recipe.watch.train, bank)
        metrics = {
            **{f"health/{name}": value for name, value in health.of_set(bank["embedding"]).items()},
            "health/feature_rankme": collapse.rankme(bank["local"]),
        }
        self.warn(metrics["health/feature_rankme"])
        if test is not None:
            name, k = self.sets.name, self.recipe.watch.neighbours
            metrics[f"probe/{name}/knn"] = knn.knn_accuracy(
                bank["embedding"], bank["label"], test["embedding"], test["label"], k
            )
            if "logits" in test:
                metrics[f"probe/{name}/linear"] = float((test["logits"].argmax(1) == test["label"]).float().mean())
        return {inside(metric, self.member): value for metric, value in metrics.items()}

    def warn(self, rank_of_features: float) -> None:
        """Say once that local features degenerate, which neither loss nor the variance of targets shows."""
        if self.warned or not self.folder.is_main or rank_of_features >= THIN:
            return
        self.warned = True
        where = f"{self.member}: " if self.member else ""
        text = (
            f"{where}local features use {rank_of_features:.1f} dimensions (health/feature_rankme): the feature encoder may be "
            "collapsing although targets vary. Lower optim.lr, raise method.momentum, or lengthen optim.warmup."
        )
        logging.getLogger("mmssl").warning(text)
        print(f"mmssl: note: {text}", file=sys.stderr)


def describe(
    trainer: SelfSupervisedTrainer, source: Source, kind: Modality, views: Views, batch: int, workers: int
) -> torch.Tensor:
    """(n, F) what the method makes of every sample, in the order of the data set; a collective.

    Gone through in a shuffled order: a method may use batch statistics, and folders are sorted by class. Raises: Interrupted
    if a rank has heard a signal.
    """
    order = random.permutation(source.size, trainer.recipe.train.seed, "describe")
    data = PlainSet(source, kind, views, order.tolist())
    batches = Loaded(data, batch, workers)
    model: Any = trainer.model_wrapped
    was_training = model.training
    model.eval()

    def run(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        trainer.heed()
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("raw", "valid", "label")}
        return model(trainer._prepare_inputs(inputs), describe=True)

    with trainer.compute_loss_context_manager():
        found = embed(batches, run, bare=True)["described"]
    model.train(was_training)
    return torch.empty_like(found).index_copy_(0, order, found).to(trainer.args.device)
