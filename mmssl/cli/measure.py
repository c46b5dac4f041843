"""the probes of a run again: mmssl measure RUN [key=value ...]

mmssl measure RUN takes the newest complete checkpoint and measures what the run itself measures every watch.every updates:
k-NN and linear accuracy, and of pairs zero-shot accuracy and recall. Keys are those of its recipe, for other data or sentences:
modalities.speech.watch.path=FOLDER, bind.prompts=["the word {}"].
"""

from __future__ import annotations

import json

from mmssl.cli.options import parse

OPTIONS = {"json": (bool, False, "print JSON")}


def run(arguments: list[str]) -> int:
    """`mmssl measure RUN`."""
    given = parse(arguments, ("RUN",), OPTIONS, overrides=True)
    from mmssl.training.measure import measure

    found = measure(given["run"], *given["overrides"])
    print(json.dumps(found) if given["json"] else "\n".join(f"{name:40}{value:.4f}" for name, value in found.items()))
    return 0
