"""Going on with other data: python -m tools.halves [data=../shared/data] [only=vision,spectrogram,text]

An encoder learns from half of a data set, then goes on (`model.init`) with the other half: other classes of images, other
speakers, other topics. Frozen features are probed on the second half before, after some updates with and without
`optim.heads_first`, and at the end. Prints the table of docs/results.md. What is there is skipped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import datasets

from mmssl.evaluate.probe import probe
from tools.demo import call
from tools.results import FOLDER, counted, finished

EARLY = (50, 100)  # updates after which the encoder is probed: heads alone until the first, all weights from there
Scores = dict[str, dict[str, float]]


class Kind(NamedTuple):
    """How a modality is learned, and where it is divided."""

    recipe: str
    data: str
    column: str  # whose values decide about the half
    first: tuple[int, ...]  # values of the first half
    words: tuple[str, ...]  # of both runs
    later: tuple[str, ...]  # of the second one alone
    vocabulary: int = 0


KINDS = {
    "vision": Kind("vision/mae-cifar10-cpu", "cifar10", "label", (0, 1, 2, 3, 4), ("train.steps=1000",), ("optim.lr=1e-3",)),
    "spectrogram": Kind("spectrogram/tera-fsdd-cpu", "fsdd", "speaker", (0, 1, 2), (), ("optim.lr=5e-4",)),
    "text": Kind("text/causal_lm-agnews-cpu", "agnews-small", "label", (0, 1), (), ("optim.lr=1.5e-3",), 4000),
}


def divide(data: Path, kind: Kind, table: Path) -> None:
    """`first/` and `second/`, each with a table of each split; which half a row is in depends on one column."""
    for name in ("train", "test"):
        rows = datasets.Dataset.from_parquet([str(file) for file in sorted(data.glob(f"{name}*.parquet"))])
        values = rows[kind.column]
        for half, inside in (("first", True), ("second", False)):
            (table / half).mkdir(parents=True, exist_ok=True)
            kept = rows.select([i for i, value in enumerate(values) if (value in kind.first) == inside])
            kept.to_parquet(table / half / f"{name}.parquet")


def learn(run: Path, *words: str) -> Path:
    """Trains, or goes on with what was stopped; the run."""
    if not finished(run):
        with counted(run):
            call(*(("resume", str(run)) if (run / "checkpoints").is_dir() else (*words, f"out={run}", "overwrite=true")))
    return run


def early(run: Path) -> dict[int, Path]:
    """The models of the checkpoints of a run, by update."""
    found = {}
    for step in EARLY:
        found[step] = run / "models" / str(step)
        if not found[step].is_dir():
            call("export", str(run), f"checkpoint={step}", f"to={found[step]}")
    return found


def measure(name: str, data: Path) -> Scores:
    """Accuracies on the second half: of the first model, of those that went on, early and at the end."""
    kind, room = KINDS[name], FOLDER / "halves" / name
    file = room / "scores.json"
    if file.is_file():
        return json.loads(file.read_text())
    if not (room / "second" / "test.parquet").is_file():
        divide(data / kind.data, kind, room)
    words = [*kind.words, "watch.every=0", "train.threads=1"]
    if kind.vocabulary:
        if not (room / "tokenizer").is_dir():
            call("tokenizer", "train", f"data={room}/first", f"out={room}/tokenizer", f"vocab={kind.vocabulary}")
        words.append(f"views.tokenizer={room}/tokenizer")
    first = learn(room / "run-first", "pretrain", kind.recipe, f"data={room}/first", *words)
    on = ["pretrain", kind.recipe, f"data={room}/second", f"model.init={first}/model", *words, *kind.later]
    models = {"before": first / "model"}
    often = [f"save.every={EARLY[0]}", "save.keep=100"]
    for which, updates in (("heads first", EARLY[0]), ("all at once", 0)):
        run = learn(room / f"run-second-{updates}", *on, *often, f"optim.heads_first={updates}")
        models |= {f"{which}, {step} updates": model for step, model in early(run).items()}
        models[f"{which}, at the end"] = run / "model"
    again = ["pretrain", kind.recipe, f"data={room}/first", *on[3:], f"optim.heads_first={EARLY[0]}"]
    models["as long again on the first half"] = learn(room / "run-again", *again) / "model"
    scores = {which: probe(model, f"{room}/second", samples=50_000)["model"] for which, model in models.items()}
    file.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def table(found: dict[str, Scores]) -> str:
    """A row for each model, k-NN and linear accuracy of each kind of data."""
    heads = ["", *(f"{name} {probe}" for name in found for probe in ("k-NN", "linear"))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for which in next(iter(found.values())):
        cells = [f"{100 * scores[which][key]:.1f}" for scores in found.values() for key in ("knn", "linear")]
        lines.append(f"| {which} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, measure, print."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    wanted = given.get("only", ",".join(KINDS)).split(",")
    if unknown := [name for name in wanted if name not in KINDS]:
        sys.exit(f"only: found {', '.join(unknown)}, expected {', '.join(KINDS)}")
    print(table({name: measure(name, Path(given.get("data", "../shared/data"))) for name in wanted}))


if __name__ == "__main__":
    main()
