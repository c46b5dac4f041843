"""make results: the runs behind docs/results.md, each skipped if it is already there. Prints the table.

python -m tools.results [data=../shared/data] [only=cifar10,fsdd,agnews-small,methods]

`methods` stands for all joint-embedding methods on the same 10 000 images with the same small encoder, 3 minutes each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

from mmssl.evaluate.probe import probe
from mmssl.methods import METHODS
from mmssl.training.run_folder import RunFolder
from tools.demo import call


class Result(NamedTuple):
    """One data set and how it is learned."""

    recipe: str
    data: str
    samples: int  # at most, of each split in the probe
    words: tuple[str, ...] = ()
    vocabulary: int = 0  # of a tokenizer to train first
    group: str | None = None  # column whose values are left out one by one in a further linear probe


RESULTS = {
    "cifar10": Result("vision/data2vec2-cifar10-cpu", "cifar10", 50_000),
    "fsdd": Result("speech/data2vec2-fsdd-cpu", "fsdd", 5_000, group="speaker"),
    "agnews-small": Result("text/data2vec2-agnews-cpu", "agnews-small", 10_000, vocabulary=4000),
}
COMPARED = [name for name, method in METHODS.items() if method.family == "joint embedding"]
RESULTS |= {name: Result(f"vision/{name}-cifar10-cpu", "cifar10", 5_000) for name in COMPARED}
FOLDER = Path("runs/results")


def finished(run: Path) -> bool:
    """Whether the run is there and complete."""
    return (run / "status.json").is_file() and RunFolder.open(run).read_status().get("state") == "finished"


def train(result: Result, data: Path, run: Path) -> None:
    """Train or go on, unless it is done."""
    if finished(run):
        return
    words = ["pretrain", result.recipe, f"data={data}", f"out={run}", *result.words]
    if result.vocabulary:
        tokenizer = FOLDER / f"{data.name}-tokenizer"
        if not tokenizer.is_dir():
            call("tokenizer", "train", f"data={data}", f"out={tokenizer}", f"vocab={result.vocabulary}")
        words.append(f"views.tokenizer={tokenizer}")
    call(*(["resume", str(run)] if (run / "checkpoints").is_dir() else words))


def main() -> None:
    """Train what is missing, measure, print."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    folder = Path(given.get("data", "../shared/data"))
    for name in given.get("only", ",".join(RESULTS)).replace("methods", ",".join(COMPARED)).split(","):
        result, run = RESULTS[name], FOLDER / name
        data = folder / result.data
        train(result, data, run)
        scores = probe(run / "model", str(data), random=True, samples=result.samples, group=result.group)
        (run / "probe.json").write_text(json.dumps(scores, indent=2) + "\n")
        for row, values in scores.items():
            cells = (f"{100 * values[key]:.1f}" if key in values else "" for key in ("knn", "linear", "left_out"))
            print(f"| {name} | {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
