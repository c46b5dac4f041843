"""The encoder of a run as a model folder."""

from __future__ import annotations

from pathlib import Path

from mmssl.config import check_recipe, read_yaml
from mmssl.errors import CheckpointError, RecipeError
from mmssl.hub import FORMATS
from mmssl.hub.formats import export_as
from mmssl.training import checkpoint as checkpoints
from mmssl.training.run_folder import RunFolder


def export(
    run: str | Path,
    to: str | Path | None = None,
    which: str | None = None,
    checkpoint: str | None = None,
    form: str = "auto",
) -> Path:
    """Write the encoder of a run's newest complete checkpoint, or of another one.

    Args:
        run: run folder.
        to: folder to write; if None `model/` in the run, `best/` with checkpoint="best", `export/FORM/` with a form.
        which: student or teacher; the one that the method's paper uses if None.
        checkpoint: `best`, by `save.best`, or a step; the newest if None.
        form: auto, a class of transformers if one fits, otherwise ours with its code; hf and remote-code, one of these; onnx,
            timm; heads, what was trained beside the encoder.
    Returns: the folder.
    Raises: MmsslError if it is no run, has no complete checkpoint, or the folder is not empty; if the form does not fit.
    """
    folder = RunFolder.open(run)
    if which not in (None, "student", "teacher"):
        raise RecipeError(f"which: found {which!r}, allowed are student and teacher.")
    if form not in FORMATS:
        raise RecipeError(f"as: found {form!r}, allowed are {', '.join(FORMATS)}.")
    if which is not None and to is None and form == "auto":
        raise RecipeError("to: missing; RUN/model keeps the recommended encoder, name another folder for a chosen network.")
    recipe = check_recipe(read_yaml(folder.config), str(folder.config))
    if checkpoint not in (None, "best") and to is None and form == "auto":
        raise RecipeError("to: missing; RUN/model keeps the newest encoder, name another folder for that of a step.")
    tensors, state = checkpoints.load(_chosen(folder, checkpoint))
    own = folder.path / "export" / form if form != "auto" else folder.best if checkpoint == "best" else folder.model
    target = Path(to) if to is not None else own
    if target.exists() and target != own and not (target.is_dir() and not any(target.iterdir())):
        raise RecipeError(f"to: {target} exists and is no empty folder. Choose another with to=FOLDER.")
    metrics = state.get("metrics", {})
    views = {name: member.build_views() for name, member in recipe.members.items()}
    return export_as(form, recipe, views, tensors["model"], target, which, metrics, int(state["step"]))


def _chosen(folder: RunFolder, wanted: str | None) -> Path:
    """The folder of a checkpoint. Raises: MmsslError if there is none."""
    newest = checkpoints.newest_or_fail(folder.checkpoints)
    if newest is None:
        raise CheckpointError(f"{folder.path} holds no checkpoint yet; the first is written after save.every updates.")
    if wanted is None:
        return newest
    if wanted == "best":
        step = checkpoints.state_of(newest).get("chosen", {}).get("best", {}).get("step")
        if step is None:
            raise RecipeError(f"checkpoint: {folder.path} keeps no best one; train with save.best.metric=probe/knn.")
    elif wanted.isdigit():
        step = int(wanted)
    else:
        raise RecipeError(f"checkpoint: found {wanted!r}, allowed are best and the number of a step.")
    path = checkpoints.place(folder.checkpoints, step)
    if reason := checkpoints.problem(path):
        there = ", ".join(str(checkpoints.step_of(p)) for p in sorted(folder.checkpoints.glob("step-*[0-9]")))
        raise CheckpointError(f"{path} cannot be used ({reason}); there are checkpoints of {there}.")
    return path
