"""write the encoder of a run as a model folder

mmssl export RUN to=FOLDER takes the newest complete checkpoint, checkpoint=best the one that save.best has kept. Without
`which`, the network that the method's paper uses downstream is written. The folder loads with AutoModel in an environment that
has torch and transformers only. A run of several kinds of data gives one model of all, and in its folder one with a model of
each.

as=FORMAT chooses what is written, to RUN/export/FORMAT unless `to` names a folder; `to=FORMAT folder=FOLDER` says the same (a
folder of that name is to=./FORMAT):
  hf           a class of transformers, or a sentence why none fits
  remote-code  MmsslModel with the code that runs it
  timm         a VisionTransformer or ResNet for timm.create_model("local-dir:FOLDER")
  onnx         model.onnx, checked against torch; needs pip install 'mmssl[onnx]'
  heads        projector, predictor, prototypes, decoder ... as safetensors, and heads.json that says what each is
"""

from __future__ import annotations

from typing import Any

from mmssl.cli.options import parse
from mmssl.errors import RecipeError
from mmssl.hub import FORMATS

OPTIONS = {
    "to": (str, None, "folder to write, or a format; RUN/model if unset, RUN/export/FORMAT with a format"),
    "as": (FORMATS, None, "what to write; if unset a class of transformers where one fits, otherwise MmsslModel with its code"),
    "folder": (str, None, "folder to write, where `to` is a format"),
    "checkpoint": (str, None, "best, or a step; the newest if unset"),
    "which": (("student", "teacher"), None, "network to write"),
}


def run(arguments: list[str]) -> int:
    """`mmssl export RUN`."""
    given = parse(arguments, ("RUN",), OPTIONS)
    from mmssl.training.export import export

    to, form = place(given)
    print(export(given["run"], to, given["which"], given["checkpoint"], form))
    return 0


def place(given: dict[str, Any]) -> tuple[str | None, str]:
    """Folder and format, however they were said. Raises: RecipeError if there are two folders."""
    to, form, folder = given["to"], given["as"], given["folder"]
    if form is None and to in FORMATS:
        return folder, to
    if to is not None and folder is not None:
        raise RecipeError(f"folder: to={to} is a folder already; leave one of them out.")
    return to or folder, form or "auto"
