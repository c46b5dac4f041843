"""make demo: train on images for a few minutes, then compare raw pixels, a random and the trained encoder.

python tools/demo.py [out=FOLDER] [seeds=0,1,2]   # with several seeds, one run each and a line each at the end
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = Path("demo-data")
NAMES = {"raw": "raw pixels", "random": "random init", "pretrained": "pretrained"}


def demo(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Train and measure; leaves the run in `folder/vision` and `folder/summary.json`."""
    from mmssl.cli import main as mmssl
    from mmssl.cli.probe import table
    from mmssl.evaluate.probe import probe

    start = time.monotonic()
    run = folder / "vision"
    words = ["vision/data2vec2-demo", f"data.path={DATA}/vision", f"out={run}", f"train.seed={seed}", "overwrite=true"]
    code = mmssl(["pretrain", *words])
    if code:
        sys.exit(code)
    scores = probe(run / "model", f"{DATA}/vision", random=True, seed=seed)
    scores["pretrained"] = scores.pop("model")
    (folder / "summary.json").write_text(json.dumps({"vision": scores}, indent=2) + "\n")
    print(f"\nimages, trained without labels for {time.monotonic() - start:.0f} s; accuracy on held-out images:\n")
    print(table({NAMES[name]: value for name, value in scores.items()}))
    return scores


def main() -> None:
    """Read the words, run, compare the seeds."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    subprocess.run([sys.executable, str(ROOT / "tools" / "make_demo_data.py"), str(DATA)], check=True)
    folder, seeds = Path(given.get("out", "runs/demo")), [int(seed) for seed in given.get("seeds", "0").split(",")]
    if len(seeds) == 1:
        demo(folder, seeds[0])
        return
    gains = []
    for seed in seeds:
        scores = demo(folder / f"seed-{seed}", seed)
        gains.append((seed, scores["random"]["knn"], scores["pretrained"]["knn"]))
    print("\nk-NN over seeds:")
    for seed, random, pretrained in gains:
        print(f"  seed {seed}: random {random:.1%}, pretrained {pretrained:.1%}, gain {100 * (pretrained - random):.1f} points")


if __name__ == "__main__":
    main()
