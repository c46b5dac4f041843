"""make demo: train on images, speech and text for a minute or two each; compare raw values, a random and the trained encoder.

python -m tools.demo [out=FOLDER] [seeds=0,1,2] [only=vision,speech,text] [train.log_every=1 ...]

With several seeds, one run each and a line each. Words with a dot are options of the recipes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.make_demo_data import MAKERS

DATA = Path("demo-data")
TOLD = {"vision": "images of digits", "speech": "spoken words of new voices", "text": "paragraphs of new documents"}
NAMES = {"raw": "raw", "random": "random init", "pretrained": "pretrained"}
METRICS = {"knn": "k-NN", "linear": "linear"}
VOCABULARY = 2000

Scores = dict[str, dict[str, float]]


def demo(folder: Path, seed: int, modality: str, words: Sequence[str] = ()) -> Scores:
    """Train and measure one modality; leaves the run in `folder/MODALITY`. words: more options of the recipe."""
    from mmssl.cli.probe import table
    from mmssl.evaluate.probe import probe

    start = time.monotonic()
    run = folder / modality
    data = f"{DATA}/{modality}"
    told = (f"data.path={data}", f"out={run}", f"train.seed={seed}", "overwrite=true", *words)
    call("pretrain", f"{modality}/data2vec2-demo", *told)
    scores = probe(run / "model", data, random=True, seed=seed)
    scores["pretrained"] = scores.pop("model")
    print(f"\n{modality}, without labels, {time.monotonic() - start:.0f} s; accuracy on held-out {TOLD[modality]}:\n")
    print(table({NAMES[name]: value for name, value in scores.items()}) + "\n")
    return scores


def make_data(modality: str) -> None:
    """Its samples, the same each time, just before they are wanted; for text a tokenizer, too."""
    MAKERS[modality](DATA)
    if modality == "text" and not (DATA / "tokenizer").is_dir():
        call("tokenizer", "train", f"data={DATA}/text", f"out={DATA}/tokenizer", f"vocab={VOCABULARY}")


def call(*words: str) -> None:
    """`mmssl WORDS`, or exit as it does."""
    from mmssl.cli import main as mmssl

    code = mmssl(words)
    if code:
        sys.exit(code)


def main() -> None:
    """Read the words, run, compare the seeds."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    folder, seeds = Path(given.get("out", "runs/demo")), [int(seed) for seed in given.get("seeds", "0").split(",")]
    modalities = given.get("only", "vision,speech,text").split(",")
    words = [f"{name}={value}" for name, value in given.items() if "." in name]
    found: dict[int, dict[str, Scores]] = {}
    for seed in seeds:
        place = folder if len(seeds) == 1 else folder / f"seed-{seed}"
        found[seed] = {}
        for modality in modalities:
            if seed == seeds[0]:
                make_data(modality)
            found[seed][modality] = demo(place, seed, modality, words)
        (place / "summary.json").write_text(json.dumps(found[seed], indent=2) + "\n")
    print("On held-out samples, random init -> pretrained:")
    for seed, summary in found.items():
        for modality, scores in summary.items():
            random, pretrained = scores["random"], scores["pretrained"]
            told = (f"{name} {random[key]:.1%} -> {pretrained[key]:.1%}" for key, name in METRICS.items())
            print(f"  {modality:8} seed {seed}: " + ", ".join(told))


if __name__ == "__main__":
    main()
