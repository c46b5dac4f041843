"""the batch of an update that was not applied, sample by sample

mmssl replay RUN step=N builds the batch that RUN/replay/step-N.json names once more, with the same augmentations and masks,
and tells the loss and the gradient norm of each sample alone, under the newest checkpoint from before that update.
"""

from __future__ import annotations

import json
import math

from mmssl.cli.options import parse

OPTIONS = {
    "step": (int, None, "update, as in the name of its record; the newest one if left out"),
    "worst": (int, 10, "samples of each micro-batch that are shown"),
    "json": (bool, False, "print all as JSON"),
}


def run(arguments: list[str]) -> int:
    """`mmssl replay RUN`."""
    given = parse(arguments, ("RUN",), OPTIONS)
    from mmssl.training.replay import replay

    found = replay(given["run"], given["step"])
    print(json.dumps(found) if given["json"] else _text(found, given["worst"]))
    return 0


def _text(found: dict, worst: int) -> str:
    lines = [f"update {found['step']}, weights: {found['weights']}"]
    for batch in found["batches"]:
        lines.append(f"rank {batch['rank']}, micro-batch {batch['micro_batch']}")
        for name, value in batch["losses"].items():
            lines.append(f"  {name}: {_short(value)}, recorded {_short(batch['recorded'].get(name, 'nothing'))}")
        lines += [
            f"  {_short(sample['loss']):>10}  gradient {_short(sample['gradient']):>10}  {sample['name']}"
            for sample in sorted(batch["samples"], key=_badness, reverse=True)[:worst]
        ]
    return "\n".join(lines)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _badness(sample: dict) -> tuple[bool, float]:
    """What is not finite comes first, then the largest gradient."""
    values = float(sample["loss"]), float(sample["gradient"])
    return not all(map(math.isfinite, values)), values[1] if math.isfinite(values[1]) else 0.0
