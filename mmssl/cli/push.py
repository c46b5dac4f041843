"""send the encoder of a run to the Hub: mmssl push RUN ORG/NAME

RUN is a run folder, whose model/ is sent, or a model folder that `mmssl export` has written. That of several kinds of data is
sent with its folders for each; RUN/model/MEMBER sends one of them. A new repository is private. All files come in one commit,
so that an interrupted push leaves the model that was there. The token is that of `hf auth login` or
HF_TOKEN.
"""

from __future__ import annotations

from pathlib import Path

from mmssl.cli.options import parse

OPTIONS = {
    "private": (bool, True, "of a new repository"),
    "dry": (bool, False, "show what would be sent, and send nothing"),
}


def run(arguments: list[str]) -> int:
    """`mmssl push RUN ORG/NAME`."""
    given = parse(arguments, ("RUN", "ORG/NAME"), OPTIONS)
    from mmssl.hub.push import plan, push

    folder, repo = Path(given["run"]), given["org/name"]
    model = folder / "model" if (folder / "model").is_dir() else folder
    if given["dry"]:
        print(f"would send to {repo}:\n{plan(model, repo).listing()}")
    else:
        print(push(model, repo, given["private"]))
    return 0
