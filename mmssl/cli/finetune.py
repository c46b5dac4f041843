"""labels for an encoder: mmssl finetune RECIPE model=MODEL data=LABELLED [key=value ...]

RECIPE is a YAML file or a shipped one: finetune/image-classification, finetune/audio-classification,
finetune/sequence-classification or finetune/ctc (transcripts). MODEL is a folder or Hub id of an encoder. Any key of the recipe
can be given as key.sub=value: model.tune=head trains the classifier alone, model.tune=lora low-rank updates, model.random=true
is the baseline of an encoder with fresh weights, data.labels=0.01 learns from a part of the labels. The run folder is `out`;
`model/` in it is a plain model of transformers. The same words follow `accelerate launch recipes/finetune.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmssl.cli.options import parse

OPTIONS = {
    "overwrite": (bool, False, "remove an earlier run in the same folder first"),
    "resume": (bool, False, "go on from the newest checkpoint in the same folder"),
}


def run(arguments: list[str]) -> int:
    """`mmssl finetune RECIPE`."""
    given = parse(arguments, ("RECIPE",), OPTIONS, overrides=True)
    from mmssl.config import FinetuneRecipe

    recipe = FinetuneRecipe.load(given["recipe"], *given["overrides"])
    from mmssl.finetune.run import finetune

    return finish(finetune(recipe, given["overwrite"], given["resume"]))


def go_on(raw: dict[str, Any], where: str) -> int:
    """`mmssl resume RUN` of such a run."""
    from mmssl.config import FinetuneRecipe
    from mmssl.finetune.run import finetune

    return finish(finetune(FinetuneRecipe.check(raw, where), resume=True))


def finish(folder: Path) -> int:
    """Say where the model is and how good; the exit status."""
    from mmssl.distributed import rank

    if rank():
        return 0
    file = folder / "results.json"
    if not file.is_file():
        print(f"Stopped by a signal and saved. Go on with: mmssl resume {folder}")
        return 0
    scores = json.loads(file.read_text())
    told = ", ".join(f"{name} {value:.1%}" for name, value in scores.items() if name != "loss")
    print(f"The model is in {folder / 'model'} ({told}).")
    return 0
