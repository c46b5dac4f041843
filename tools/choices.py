"""Whether label-free metrics choose the checkpoint that k-NN would: python -m tools.choices [data=demo-data] [points=10]

Trains the three demo runs with many checkpoints (skipped where it is there), measures each checkpoint with and without labels,
and prints a table for docs/results.md: Spearman's rank correlation of each metric with k-NN accuracy over the checkpoints of a
run, and how much accuracy is lost by the checkpoint that the metric likes best.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from mmssl.config import Recipe
from mmssl.evaluate.probe import probe
from tools.demo import VOCABULARY, call
from tools.make_demo_data import write
from tools.results import finished

FOLDER = Path("runs/results/choices")
KINDS = ("vision", "speech", "text")
METRICS = {  # 1: more is better, -1: less; said before anything was measured
    **{"rankme": 1, "effective_rank": 1, "lidar": 1, "alpha_req": -1, "uniformity": -1, "alignment": -1},
    **{"invariance": 1, "rotation": 1, "reversal": 1, "order": 1, "loss": -1},
}

Points = list[dict[str, float]]


def points(kind: str, data: Path, count: int) -> Points:
    """`step`, `loss`, `knn` and metrics of the checkpoints of the demo run of a modality."""
    run, recipe = FOLDER / kind, f"{kind}/data2vec2-demo"
    file = run / "points.json"
    if file.is_file():
        return json.loads(file.read_text())
    steps = Recipe.load(recipe, f"data.path={data / kind}").train.steps
    assert steps is not None
    if not finished(run):
        each = max(1, steps // count)
        saves = [f"save.every={each}", f"save.keep={count + 1}", f"train.log_every={each}"]
        call("pretrain", recipe, f"data={data / kind}", f"out={run}", "overwrite=true", *saves, "watch.every=0",
             "watch.change=false", *([f"views.tokenizer={data}/tokenizer"] if kind == "text" else []))  # fmt: skip
    losses = {line["step"]: line["loss"] for line in lines(run) if "loss" in line}
    found = []
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        step = int(checkpoint.name.removeprefix("step-"))
        model = run / "models" / str(step)
        if not model.is_dir():
            call("export", str(run), f"checkpoint={step}", f"to={model}")
        scores = probe(model, str(data / kind), metrics=True)["model"]
        found.append({"step": step, "loss": losses[step], "knn": scores["knn"], **scores["metrics"]})
        print(f"{kind} {step}: k-NN {scores['knn']:.1%}", file=sys.stderr, flush=True)
    file.write_text(json.dumps(found, indent=2) + "\n")
    return found


def lines(run: Path) -> Points:
    """Of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def judged(found: Points, metric: str, sign: int) -> tuple[float, float] | None:
    """Rank correlation with k-NN accuracy, -1..1, and what choosing by the metric loses, 0..1.

    None if the metric was not measured or is always the same.
    """
    if not all(metric in point for point in found) or len({point[metric] for point in found}) < 2:
        return None
    values, knn = [sign * point[metric] for point in found], [point["knn"] for point in found]
    ranks: Any = spearmanr(values, knn)
    return float(ranks.statistic), max(knn) - knn[values.index(max(values))]


def table(runs: dict[str, Points]) -> str:
    """A row for each metric, two columns for each run."""
    heads = ["chosen by", *(head for kind in runs for head in (f"{kind}: correlation", "lost"))]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for metric, sign in METRICS.items():
        cells = []
        for found in runs.values():
            one = judged(found, metric, sign)
            cells += ["", ""] if one is None else [f"{one[0]:+.2f}", f"{100 * one[1]:.1f}"]
        name = metric.replace("_", " ")
        rows.append(f"| {'high' if sign > 0 else 'low'} {name} | " + " | ".join(cells) + " |")
    spread = (f"{100 * min(k):.1f} to {100 * max(k):.1f}" for k in ([p["knn"] for p in found] for found in runs.values()))
    return "\n".join([*rows, "| k-NN accuracy of the checkpoints | " + " | | ".join(spread) + " | |"])


def main() -> None:
    """Train what is missing, measure, print."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    data = Path(given.get("data", "demo-data"))
    if not data.is_dir():
        write(data)
    if not (data / "tokenizer").is_dir():
        call("tokenizer", "train", f"data={data}/text", f"out={data}/tokenizer", f"vocab={VOCABULARY}")
    print(table({kind: points(kind, data, int(given.get("points", "10"))) for kind in KINDS}))


if __name__ == "__main__":
    main()
