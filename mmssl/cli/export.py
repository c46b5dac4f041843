"""write the encoder of a run as a model folder

mmssl export RUN to=FOLDER takes the newest complete checkpoint, checkpoint=best the one that save.best has kept. Without
`which`, the network that the method's paper uses downstream is written. The folder loads with AutoModel in an environment that
has torch and transformers only. A run of several kinds of data gives one model of all, and in its folder one with a model of
each.
"""

from __future__ import annotations

from mmssl.cli.options import parse

OPTIONS = {
    "to": (str, None, "folder to write; RUN/model if unset"),
    "checkpoint": (str, None, "best, or a step; the newest if unset"),
    "which": (("student", "teacher"), None, "network to write"),
}


def run(arguments: list[str]) -> int:
    """`mmssl export RUN`."""
    given = parse(arguments, ("RUN",), OPTIONS)
    from mmssl.training.export import export

    print(export(given["run"], given["to"], given["which"], given["checkpoint"]))
    return 0
