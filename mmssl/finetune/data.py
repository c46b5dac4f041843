"""Labelled samples for a model with a head.

A modality that can be fine-tuned names a module with a class `Inputs` (its `tune`). It is made of the model's folder and the
options of the recipe's `views`, has the `processor` to save with the model, and maps decoded samples, and a seed of each in
training, to what the model takes. It may have `mix`, which mixes a batch and its classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmssl import random
from mmssl.config import FinetuneRecipe
from mmssl.data.sources import Source, open_source, splits
from mmssl.errors import DataError, RecipeError
from mmssl.evaluate.features import few_labels, held_out, labelled
from mmssl.registry import Modality
from mmssl.types import Rejected

IGNORED = -100  # a label that counts nowhere
TEXTS = ("text", "transcription", "transcript", "sentence", "normalized_text")  # usual names of columns of transcripts
ATTEMPTS = 100  # substitutes tried for a sample that cannot be read


class Labelled(Dataset):
    """Decoded samples with their class or transcript. In training each has a seed of its own in each epoch.

    For one that cannot be read the next one stands in; in the test that one counts nowhere.
    """

    epoch = 0

    def __init__(self, source: Source, kind: Modality, indices: Tensor, texts: Source | None, seed: int | None):
        """texts: of the same rows, if they have transcripts.  seed: of the run in training, None in the test."""
        self.source, self.kind, self.indices, self.texts, self.seed = source, kind, indices.tolist(), texts, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """`sample`, `label` (a class or a text), `seed`."""
        reason = ""
        for attempt in range(ATTEMPTS):
            index = self.indices[(position + attempt) % len(self)]
            try:
                sample, label = self.kind.decode(self.source.value(index)), self.label(index)
            except Exception as error:  # whatever a decoder meets, it is about this sample
                reason = reason or f"{self.source.identity(index)}: {error}"
                continue
            if self.seed is None:
                return {"sample": sample, "label": self.nothing if attempt else label, "seed": None}
            return {"sample": sample, "label": label, "seed": random.key(self.seed, "finetune", self.epoch, index)}
        raise DataError(f"data: neither a sample nor {ATTEMPTS} after it can be used; the first: {reason}")

    @property
    def nothing(self) -> int | str:
        """The label of what counts nowhere."""
        return IGNORED if self.texts is None else ""

    def label(self, index: int) -> int | str:
        """Class or transcript. Raises: Rejected if there is none."""
        if self.texts is None:
            return self.source.label_at(index)
        return transcript(self.texts, index)

    def transcripts(self) -> list[str]:
        """All that there are. Raises: RecipeError if there is none."""
        found = []
        for index in self.indices:
            with suppress(Rejected):
                found.append(str(self.label(index)))
        if not found:
            raise RecipeError("data.text: no recording to learn from has a transcript; fill the column, or name another.")
        if len(found) < len(self):
            print(f"mmssl: note: {len(self) - len(found)} recordings without a transcript are replaced.", file=sys.stderr)
        return found


def transcript(texts: Source, index: int) -> str:
    """Without white space around and more than one between words. Raises: Rejected if there is none."""
    value = texts.value(index)
    text = " ".join((value if isinstance(value, str) else value.decode("utf-8", "replace")).split())
    if not text:
        raise Rejected("empty", "no transcript")
    return text


class Sets(NamedTuple):
    """What is learned from and what is measured."""

    train: Labelled
    test: Labelled
    classes: list[str]  # empty for transcripts
    facts: dict[str, Any]


def open_sets(recipe: FinetuneRecipe, kind: Modality) -> Sets:
    """Training and test set. Raises: RecipeError naming the key and the mend."""
    where, seed, spoken = recipe.data.source(kind.name), recipe.train.seed, recipe.task == "ctc"
    source = open_source(where, kind, recipe.data.split)
    apart = recipe.data.test in splits(where, kind)
    test = open_source(where, kind, recipe.data.test) if apart else source
    texts, test_texts = (_texts(recipe, kind, of) if spoken else None for of in (source, test))
    if not spoken and not source.classes:
        raise RecipeError(
            f"data.label: {recipe.data.path} has no labels; name their column with data.label=COLUMN, or use one folder for "
            "each class."
        )
    if spoken:
        order, held = (random.permutation(of.size, seed, "finetune") for of in (source, test))
        held = held if apart else order[: max(1, len(order) // 10)]
    else:
        order = labelled(source, random.permutation(source.size, seed, "finetune"))
        held = labelled(test, random.permutation(test.size, seed, "finetune-test")) if apart else held_out(source, seed)
    learned = order if apart else order[~torch.isin(order, held)]
    learned = _few(learned, source, recipe)
    if not len(learned) or not len(held):
        raise RecipeError(f"data.path: {recipe.data.path} has {len(learned)} labelled samples to learn from and {len(held)} to "
                          "measure on; give more.")  # fmt: skip
    if not spoken:
        _check_classes(source, test, learned, held, recipe)
    held = held[: recipe.watch.samples].sort().values
    facts = {"train": source.facts | {"learned": len(learned)}, "test": test.facts | {"measured": len(held)}}
    classes = [] if spoken else list(source.facts["classes"])
    train = Labelled(source, kind, learned.sort().values, texts, seed)
    return Sets(train, Labelled(test, kind, held, test_texts, None), classes, facts)


def _few(learned: Tensor, source: Source, recipe: FinetuneRecipe) -> Tensor:
    share = recipe.data.labels
    if share is None:
        return learned
    if recipe.task == "ctc":
        return learned[: max(1, round(share * len(learned)))]
    assert source.labels is not None
    return few_labels(learned, source.labels[learned], share, recipe.train.seed)


def _check_classes(source: Source, test: Source, learned: Tensor, held: Tensor, recipe: FinetuneRecipe) -> None:
    """Whether every class that is measured can be learned."""
    assert source.labels is not None
    assert test.labels is not None
    names = source.facts["classes"]
    known, asked = ({*of.labels[rows].tolist()} for of, rows in ((source, learned), (test, held)))  # type: ignore[index]
    if unknown := sorted(asked - known):
        told = ", ".join(names[number] for number in unknown[:5])
        raise RecipeError(
            f"data.test: {len(unknown)} of its classes ({told}) have no sample in the split {recipe.data.split!r}, and "
            "cannot be learned; add such samples, or take them out of the test."
        )
    if len(known) < 2:
        raise RecipeError(f"data.label: all samples to learn from are of one class, {names[min(known)]}; add another.")
    if absent := [name for number, name in enumerate(names) if number not in known]:
        print(f"mmssl: note: there is no sample to learn from of {', '.join(absent[:10])}.", file=sys.stderr)


def _texts(recipe: FinetuneRecipe, kind: Modality, source: Source) -> Source:
    """The transcripts beside the rows of a source. Raises: RecipeError if there are none."""
    if source.facts["kind"] == "folder":
        raise RecipeError(
            f"data.path: {recipe.data.path} is a folder of recordings without transcripts; give a table with a column of file "
            "names (file_name) and one of transcripts (text), and data.root=FOLDER if the files lie elsewhere."
        )
    reasons = []
    for name in [recipe.data.text] if recipe.data.text else TEXTS:
        if name == source.column:
            continue
        try:
            found = open_source(recipe.data.source(kind.name, column=name), kind, source.facts["split"])
            return found._replace(names=False)
        except RecipeError as error:
            reasons.append(error)
    raise RecipeError(
        f"data.text: {recipe.data.path} has no column of transcripts named {recipe.data.text or ' or '.join(TEXTS)}; choose "
        "one with data.text=COLUMN."
    ) from reasons[-1]


class Collator:
    """Samples to what the model takes, and `labels`: classes (B,) or shares of them (B, C), or ids (B, n), -100 = none."""

    def __init__(self, inputs: Any, classes: int, encode: Any = None):
        """encode: transcript -> ids; None where there are classes."""
        self.inputs, self.classes, self.encode = inputs, classes, encode

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch."""
        seeds = [sample["seed"] for sample in samples]
        whole = {} if self.encode is None else {"cut": False}
        batch = self.inputs([sample["sample"] for sample in samples], None if None in seeds else seeds, **whole)
        if self.encode is not None:
            rows = [torch.tensor(self.encode(sample["label"]), dtype=torch.int64) for sample in samples]
            return {**batch, "labels": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)}
        labels = torch.tensor([sample["label"] for sample in samples])
        if None not in seeds and hasattr(self.inputs, "mix") and len(samples) > 1:
            batch, labels = self.inputs.mix(batch, labels, self.classes, seeds[0])
        return {**batch, "labels": labels}
