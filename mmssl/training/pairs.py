"""Kinds of data whose rows are pairs: whether they fit, and what they find out about each other on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.config.pairs import BindOptions
from mmssl.errors import RecipeError
from mmssl.evaluate.crossing import nearest, recall
from mmssl.evaluate.features import BATCH
from mmssl.training.member import Member
from mmssl.training.objective import called, inside
from mmssl.training.trainer import SelfSupervisedTrainer
from mmssl.types import Batch, Rejected


def check_pairs(members: Sequence[Member], bind: BindOptions) -> None:
    """Whether the rows of members belong together. Raises: RecipeError that names the data and the mend."""
    bound = [member for member in members if member.recipe.paired]
    kinds = {member.name: f"{member.source.size} of a {member.source.facts['kind']}" for member in bound}
    if len({*kinds.values()}) > 1:
        listing = ", ".join(f"{name} reads {what}" for name, what in kinds.items())
        raise RecipeError(f"data.path: {listing}; pairs are rows of one table, choose with data.column.")
    if bind.incomplete == "skip":
        return
    absent = {member: member.source.absent() for member in bound}
    lacking = torch.stack([*absent.values()]).any(0)
    if bool(lacking.any()):
        member, rows = next((member, rows) for member, rows in absent.items() if bool(rows.any()))
        first = member.source.identity(int(rows.nonzero()[0]))
        raise RecipeError(
            f"data.path: {int(lacking.sum())} of {len(lacking)} rows lack one side of their pair, {first} has no "
            f"{member.source.column!r} for one. Fill them in or remove them; bind.incomplete=skip leaves them out."
        )


class Crossing:
    """What bound members make of each other's held-out data: classes by their names alone, and a row's other side."""

    def __init__(self, members: Sequence[Member], bind: BindOptions):
        """Read the names of classes. Raises: RecipeError if one of them cannot be read."""
        self.bound = [member for member in members if member.recipe.paired]
        self.prompts = bind.prompts
        self.reader = next((member for member in self.bound if "text" in member.kind.columns), None)
        others = (member for member in self.bound if member is not self.reader and self.reader is not None)
        self.named = {member.name: batches for member in others if (batches := self._named(member))}

    def _named(self, member: Member) -> list[dict[str, Tensor]]:
        """Flat batches of the names of a member's classes in all prompts, prompt by prompt; none without labels."""
        sets, reader = member.probes.sets, self.reader
        if sets is None or sets.test is None or reader is None:
            return []
        names = sets.test.data.source.facts["classes"]
        try:
            texts = [reader.kind.decode(prompt.format(name).encode()) for prompt in self.prompts for name in names]
            parts = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
            return [Batch([reader.views.plain(part)], torch.arange(len(part))).tensors() for part in parts]
        except Rejected as error:
            raise RecipeError(
                f"bind.prompts: {reader.name} cannot read the name of a class of {member.name} in them ({error})."
            ) from None

    def measure(self, trainer: SelfSupervisedTrainer) -> dict[str, float]:
        """Accuracy of the nearest name beside that of a guess, and how often a row's other side is the nearest, both ways.

        After all members have measured their own; a collective.
        """
        metrics = {}
        for member in self.bound:
            if member.name in self.named and member.probes.bound is not None:
                name, rows = member.probes.bound
                classes = self._classes(trainer, self.named[member.name])
                right = (nearest(rows["bound"], classes) == rows["label"]).float().mean()
                found = {"zeroshot": float(right), "zeroshot_chance": 1 / len(classes)}
                metrics |= {inside(f"probe/{name}/{metric}", member.name): value for metric, value in found.items()}
        for one, other in combinations(self.bound, 2):
            metrics |= self._recall(one, other)
        return metrics

    def _classes(self, trainer: SelfSupervisedTrainer, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """(K, F): what the reader makes of each class, the mean direction over prompts."""
        assert self.reader is not None
        model: Any = trainer.model_wrapped
        was_training = model.training
        model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            inputs = (trainer._prepare_inputs(called(batch, self.reader.name)) for batch in batches)
            found = torch.cat([model(one)["bound"].float().cpu() for one in inputs])
        model.train(was_training)
        return F.normalize(found, dim=1).unflatten(0, (len(self.prompts), -1)).mean(0)

    def _recall(self, one: Member, other: Member) -> dict[str, float]:
        """Where both have measured rows of one set."""
        if one.probes.bound is None or other.probes.bound is None or one.probes.bound[0] != other.probes.bound[0]:
            return {}
        name, mine = one.probes.bound
        _, theirs = other.probes.bound
        first, second = _common(mine["index"].tolist(), theirs["index"].tolist())
        if not first:
            return {}
        a, b = (
            {what: rows[what][places] for what in ("bound", "content")} for rows, places in ((mine, first), (theirs, second))
        )
        return {
            f"probe/{one.name}-{other.name}.{name}/recall": recall(a["bound"], b["bound"], a["content"], b["content"]),
            f"probe/{other.name}-{one.name}.{name}/recall": recall(b["bound"], a["bound"], b["content"], a["content"]),
        }


def _common(one: Sequence[int], other: Sequence[int]) -> tuple[list[int], list[int]]:
    """Places of the same rows in both, in order."""
    places = {index: place for place, index in enumerate(other)}
    found = [(place, places[index]) for place, index in enumerate(one) if index in places]
    return [a for a, _ in found], [b for _, b in found]
