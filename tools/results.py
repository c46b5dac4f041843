"""make results: the runs behind docs/results.md, each skipped if it is already there. Prints the table.

python -m tools.results [FOLDER]   # of the real data, ../shared/data if unset
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mmssl.cli import main as mmssl
from mmssl.evaluate.probe import probe
from mmssl.training.run_folder import RunFolder

RUNS = {"cifar10": "vision/data2vec2-cifar10-cpu"}  # data set -> recipe
SAMPLES = {"cifar10": 50_000}


def finished(run: Path) -> bool:
    """Whether the run is there and complete."""
    return (run / "status.json").is_file() and RunFolder.open(run).read_status().get("state") == "finished"


def main() -> None:
    """Train what is missing, measure, print."""
    data = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data")
    for name, recipe in RUNS.items():
        run = Path("runs/results") / name
        if not finished(run):
            words = (
                ["resume", str(run)]
                if (run / "checkpoints").is_dir()
                else ["pretrain", recipe, f"data={data / name}", f"out={run}"]
            )
            code = mmssl(words)
            if code:
                sys.exit(code)
        scores = probe(run / "model", str(data / name), random=True, samples=SAMPLES[name])
        (run / "probe.json").write_text(json.dumps(scores, indent=2) + "\n")
        for row, values in scores.items():
            print(f"| {name} | {recipe} | {row} | " + " | ".join(f"{100 * v:.1f}" for v in values.values()) + " |")


if __name__ == "__main__":
    main()
