"""The encoder of a run as a model folder."""

from __future__ import annotations

from pathlib import Path

from mmssl.config import check_recipe, read_yaml
from mmssl.errors import CheckpointError, RecipeError
from mmssl.hub.export import export_encoders
from mmssl.training import checkpoint
from mmssl.training.run_folder import RunFolder


def export(run: str | Path, to: str | Path | None = None, which: str | None = None) -> Path:
    """Write the encoder of a run's newest complete checkpoint.

    Args:
        run: run folder.
        to: folder to write; `model/` in the run if None.
        which: student or teacher; the one that the method's paper uses if None.
    Returns: the folder.
    Raises: MmsslError if it is no run, has no complete checkpoint, or the folder is not empty.
    """
    folder = RunFolder.open(run)
    if which not in (None, "student", "teacher"):
        raise RecipeError(f"which: found {which!r}, allowed are student and teacher.")
    if which is not None and to is None:
        raise RecipeError("to: missing; RUN/model keeps the recommended encoder, name another folder for a chosen network.")
    recipe = check_recipe(read_yaml(folder.config), str(folder.config))
    newest = checkpoint.newest_or_fail(folder.checkpoints)
    if newest is None:
        raise CheckpointError(f"{run} holds no checkpoint yet; the first is written after save.every updates.")
    tensors, state = checkpoint.load(newest)
    target = Path(to) if to is not None else folder.model
    if target.exists() and target != folder.model and not (target.is_dir() and not any(target.iterdir())):
        raise RecipeError(f"to: {target} exists and is no empty folder. Choose another with to=FOLDER.")
    metrics = state.get("metrics", {})
    views = {name: member.build_views() for name, member in recipe.members.items()}
    return export_encoders(recipe, views, tensors["model"], target, which, metrics, int(state["step"]))
