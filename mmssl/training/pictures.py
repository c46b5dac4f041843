"""What a method made of what it did not see, as pictures in the run folder."""

from __future__ import annotations

from typing import Any

import torch

from mmssl.data.dataset import KeyedDataset
from mmssl.data.quarantine import Quarantine
from mmssl.data.sources import Source
from mmssl.evaluate.features import Sets
from mmssl.methods import Method
from mmssl.random import row_keys
from mmssl.registry import Modality, Views
from mmssl.training.objective import Objective, called
from mmssl.training.run_folder import RunFolder
from mmssl.training.trainer import SelfSupervisedTrainer
from mmssl.types import Rebuilt

SAMPLES = 8


class Pictures:
    """The same few samples under the same masks whenever probes are taken: `report/rebuilt-STEP.png`.

    They are of the split that probes classify, if there is one of its own, and otherwise of the data that are learned from.
    """

    def __init__(
        self, source: Source, sets: Sets | None, kind: Modality, views: Views, folder: RunFolder, seed: int, member: str = ""
    ):
        self.member = member  # name of the kind of data, where a run has several
        test = None if sets is None or sets.name == "heldout" else sets.test
        self.held = None if test is None else test.data
        self.source, self.kind, self.views, self.folder, self.seed = source, kind, views, folder, seed
        self.batch: dict[str, torch.Tensor] = {}

    def draw(self, trainer: SelfSupervisedTrainer, objective: Objective) -> None:
        """A collective, since weights may be sharded. Nothing if the method rebuilds nothing, or nothing that can be drawn."""
        method = objective.method
        if self.kind.draw is None or type(method).rebuild is Method.rebuild or not self._samples():
            return
        self.batch = self.batch or self._batch()
        model: Any = trainer.model_wrapped
        was_training = model.training
        model.eval()
        keys: Any = row_keys(self.seed, 0, 0, len(self.batch["index"]), 0, 1)
        keys = {self.member: keys} if self.member else keys
        with torch.no_grad(), trainer.compute_loss_context_manager():
            found = model(trainer._prepare_inputs(called(self.batch, self.member)), keys, trainer.clock, rebuild=True)
        model.train(was_training)
        if self.folder.is_main and found:
            rebuilt = Rebuilt(**{name: tensor.cpu() for name, tensor in found.items()})
            picture = self.kind.draw(rebuilt, self.views, method.student.encoder.features)
            path = (
                self.folder.path / "report" / f"{self.member and f'{self.member}-'}rebuilt-{trainer.state.global_step:07d}.png"
            )
            path.parent.mkdir(exist_ok=True)
            picture.save(path)

    def _samples(self) -> bool:
        """Whether there are any that can be found again: rows of a stream cannot."""
        return self.held is not None or not self.source.streaming

    def _batch(self) -> dict[str, torch.Tensor]:
        """Samples spread over the data, as the first pass sees them; bad ones are replaced and not counted."""
        source = self.source if self.held is None else self.held.source
        places = range(source.size) if self.held is None else self.held.indices
        data = KeyedDataset(source, self.kind, self.views, self.seed, Quarantine(None, 1.0, 1_000_000))
        chosen = torch.linspace(0, len(places) - 1, min(SAMPLES, len(places))).long().unique()
        batch = data.collate([data[0, places[place]] for place in chosen.tolist()])
        return {name: tensor for name, tensor in batch.items() if name != "label"}
