"""Checkpoints that the authors of data2vec have published, as model folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.hub.card import converted_card
from mmssl.hub.export import appearing, write_encoder
from mmssl.hub.inert import Stored, TorchFile, told
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.published import Layout, Told, gathered, wrong
from mmssl.registry import modalities, modality

WEIGHTS = ("model", "module")  # where files hold them
AVERAGE = "_ema"
TUNED = ("w2v_encoder.w2v_model.", "model.")  # before an encoder's names in a model with a head
# Configurations beside weights, that of a pretrained encoder within a model with a head first.
SETTINGS = ("cfg.model.w2v_args", "cfg.model.pretrained_model_args", "cfg", "args*")
SHOWN = 20  # names in a message


class Held(NamedTuple):
    """What a checkpoint holds."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor] | None
    head: list[str]  # names of what is not the encoder's, in a fine-tuned model
    told: Told


def convert(
    checkpoint: str | Path, to: str | Path, which: str | None = None, files: Mapping[str, Path] | None = None
) -> tuple[Path, list[str]]:
    """Write a model folder of a published data2vec checkpoint.

    Args:
        checkpoint: file of `torch.save`; nothing that it names is executed.
        which: student or teacher; the teacher if None, or the student where there is none.
        files: dictionary, vocab and merges of a text model, for its tokenizer.
    Returns: the folder; sentences on what was left out.
    Raises: RecipeError listing names that are missing, unknown or of another shape, or saying what else is wrong.
    """
    source, target = Path(checkpoint).expanduser(), Path(to).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise RecipeError(f"to: {target} exists and is no empty folder. Choose another with to=FOLDER.")
    with TorchFile(source) as file:
        held = _held(file)
    kind, layout = _layout(source, held)
    which = which or ("student" if held.teacher is None else "teacher")
    tensors = _chosen(source, held, layout, which)
    notes = (
        [f"It was fine-tuned: {len(held.head)} tensors of its head are left out ({_listed(held.head)})."] if held.head else []
    )
    try:
        config = layout.config(tensors, held.told)
        weights = _weights(config, layout, tensors, {**tensors, **held.student})
        processor, note = layout.prepare(config, held.told, _checked(files or {}, kind))
    except KeyError as error:
        raise RecipeError(f"{source} is no {layout.title}: it lacks {error.args[0]}.") from None
    except ValueError as error:
        raise RecipeError(f"{source}, {layout.title}: {error}") from None
    with appearing(target) as aside:
        architecture = write_encoder(config, weights, aside, released=layout.native)
        if processor is not None:
            processor.save_pretrained(aside)
        (aside / "README.md").write_text(converted_card(layout.title, which, source.name, config, architecture, note))
    said = f"{layout.title}, the {which}, as {architecture}."
    return target, [said, *notes, *filter(None, [note])]


def _held(file: TorchFile) -> Held:
    """Student, teacher and configuration. Raises: RecipeError if there is no model."""
    content = file.content if isinstance(file.content, dict) else {}
    found = next((content[name] for name in WEIGHTS if isinstance(content.get(name), dict)), None)
    if not found or not all(isinstance(name, str) for name in found):
        raise RecipeError(f"{file.path} holds no weights: a checkpoint of data2vec is a dict with an entry `model`.")
    stored = {name: tensor for name, tensor in found.items() if isinstance(tensor, Stored)}
    averages = [value for name, value in found.items() if name.split(".")[-1] == AVERAGE and isinstance(value, dict)]
    averages += [content["model_ema"]] if isinstance(content.get("model_ema"), dict) else []
    prefix = next((p for p in TUNED if any(name.startswith(p) for name in stored)), "")
    head = [name for name in stored if not name.startswith(prefix)]
    return Held(
        _read(file, {name.removeprefix(prefix): one for name, one in stored.items() if name.startswith(prefix)}),
        _read(file, averages[0]) if averages and averages[0] else None,
        head,
        told(content, *SETTINGS),
    )


def _read(file: TorchFile, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): file.tensor(one) for name, one in stored.items() if isinstance(one, Stored)}


def _layout(source: Path, held: Held) -> tuple[str, Layout]:
    """The kind of data and the layout of a checkpoint. Raises: RecipeError unless it is of just one."""
    known = [(name, layout) for name in modalities() for layout in _layouts(name)]
    found = [(n, layout) for n, layout in known if any(name.startswith(layout.mark) for name in held.student)]
    if len(found) == 1:
        return found[0]
    titles = "; ".join(layout.title for _, layout in (found or known))
    raise RecipeError(
        f"{source} holds several encoders ({titles}); published checkpoints hold one, and one is converted."
        if found
        else f"{source} is of no layout that is known ({titles}); its names are {_listed(held.student)}."
    )


def _layouts(name: str) -> tuple[Layout, ...]:
    published = modality(name).published
    return import_module(published).LAYOUTS if published else ()


def _chosen(source: Path, held: Held, layout: Layout, which: str) -> dict[str, Tensor]:
    """Weights of the student, or those of the teacher with what it takes from the student. Raises: RecipeError."""
    if which == "student":
        return held.student
    if held.teacher is None:
        raise RecipeError(f"which=teacher: {source} holds no average (`{AVERAGE}`); convert the student with which=student.")
    average = {f"{layout.averaged}{name}": tensor for name, tensor in held.teacher.items()}
    return {name: tensor for name, tensor in held.student.items() if name.startswith(layout.shared or "\0")} | average


def _weights(config: MmsslConfig, layout: Layout, tensors: dict[str, Tensor], every: Iterable[str]) -> dict[str, Tensor]:
    """By our names. Raises: ValueError with all that is wrong, also with names of the network that is not wanted."""
    with torch.device("meta"):
        wanted = Encoder.from_config(config).state_dict()
    names = layout.names(config)
    if problems := wrong(names, wanted, tensors, every, layout.idle):
        more = [f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError("\n".join([f"{len(problems)} names do not fit:", *(f"  {p}" for p in problems[:SHOWN]), *more]))
    weights = gathered(names, wanted, tensors)
    if broken := [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"weights are not finite: {_listed(broken)}")
    return weights


def _checked(files: Mapping[str, Path], kind: str) -> Mapping[str, Path]:
    """Files of a tokenizer, for a model that has one. Raises: ValueError."""
    if files and getattr(modality(kind).features, "input_name", None) != "input_ids":
        raise ValueError(f"{', '.join(files)}: for text only; leave it out")
    return files


def _listed(names: Any, most: int = 5) -> str:
    first, rest = [*names][:most], len([*names]) - most
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
