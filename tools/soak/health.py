"""Short runs in which nothing is wrong: none may raise an alarm."""

from __future__ import annotations

import json
from pathlib import Path

from tools.soak.runs import Child, Row, mmssl

RUNS = (
    *("vision/mae-demo", "vision/ibot-demo", "vision/msn-demo", "vision/data2vec2-demo"),
    *("speech/simclr-demo", "speech/dino-demo", "speech/wav2vec2-demo", "spectrogram/tera-demo"),
    *("text/vicreg-demo", "text/mlm-demo"),
)
SECONDS = 1800.0  # for each at most


def campaign(place: Path, updates: int, recipes: tuple[str, ...] = RUNS) -> Row:
    """Each of the recipes for that many updates. place: a folder that `runs.prepare` has filled."""
    child = Child(lambda: write(place / "data"), place / "demo-data.log")
    child.wait(seconds=SECONDS)
    lines, wrong = 0, [] if child.code == 0 else [f"data: {child.said()}"]
    for recipe in recipes if not wrong else ():
        run = place / recipe.replace("/", "-")
        child = mmssl(*words(recipe, place, updates), f"out={run}", log=place / f"{run.name}.log")
        child.wait(seconds=SECONDS)
        told = verdicts(run)
        lines += len(told)
        alarms = [f"{recipe}, step {step}: {said}" for step, said in told if said != "healthy"]
        wrong += alarms[:1] if child.code == 0 and told else [f"{recipe}: exit {child.code}: {child.said()}"]
    tried = f"{len(recipes)} short runs of different methods and kinds of data, {updates} updates each"
    return Row("health", tried, f"no alarm in {lines} lines", tuple(wrong))


def write(folder: Path) -> int:
    """The demo's data and its tokenizer."""
    from mmssl.cli import main
    from tools.make_demo_data import write

    write(folder)
    return main(("tokenizer", "train", f"data={folder}/text", f"out={folder}/tokenizer", "vocab=2000"))


def words(recipe: str, place: Path, updates: int) -> list[str]:
    """Of the command line."""
    kind = recipe.partition("/")[0]
    data = place / "data" / {"spectrogram": "speech"}.get(kind, kind)
    found = ["pretrain", recipe, f"data={data}", f"train.steps={updates}", "train.log_every=5", "train.threads=1"]
    found += ["data.workers=0", "watch.every=0", "watch.samples=100", "watch.change=false", "watch.pictures=false"]
    return found + ([f"views.tokenizer={place}/data/tokenizer"] if kind == "text" else [])


def verdicts(run: Path) -> list[tuple[int, str]]:
    """Step and what was said of each line about updates."""
    file = run / "metrics.jsonl"
    every = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [(line["step"], line["verdict"]) for line in every if "verdict" in line]
