"""The probes of a run again, after it, perhaps on other data."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mmssl.config import load_recipe
from mmssl.errors import CheckpointError
from mmssl.training import checkpoint
from mmssl.training.pretrain import prepare
from mmssl.training.run_folder import RunFolder
from mmssl.training.state import load_model_state


def measure(run: str | Path, *overrides: str) -> dict[str, float]:
    """What the newest complete checkpoint of a run makes of the sets of `watch`.

    Args:
        run: run folder.
        overrides: `key.sub=value` of its recipe, such as `modalities.speech.watch.path=FOLDER`.
    Returns: `probe/...` and `health/...`, as in metrics.jsonl.
    Raises: MmsslError if it is no run or has no complete checkpoint, or as `pretrain` would.
    """
    folder = RunFolder.open(run)
    newest = checkpoint.newest_or_fail(folder.checkpoints)
    if newest is None:
        raise CheckpointError(f"{run} holds no checkpoint yet; the first is written after save.every updates.")
    tensors, _ = checkpoint.load(newest)
    with tempfile.TemporaryDirectory() as temporary:
        recipe = load_recipe(folder.config, *overrides, "train.report_to=[]", "hub.repo=null", f"out={Path(temporary) / 'run'}")
        prepared = prepare(recipe)
        load_model_state(prepared.objective, tensors["model"])
        return prepared.measure(prepared.trainer)
