"""What is left and said of a run that has ended: its failure, its results."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from mmssl.distributed import rank
from mmssl.errors import INTERRUPTED, MmsslError, RankError, storage_error
from mmssl.training.peers import Peers
from mmssl.training.run_folder import RunFolder


def record_failure(folder: RunFolder, peers: Peers, error: BaseException, **facts: Any) -> None:
    """Leave the cause in status.json, if the folder can still be written.

    The main process writes it, or any other one if that has gone.
    """
    code = error.code if isinstance(error, MmsslError) else (6 if storage_error(error, "") else 8)
    state = "preempted" if code == INTERRUPTED else "failed"
    folder = RunFolder(folder.path) if 0 in peers.gone() else folder
    try:
        folder.status(state, error=f"{type(error).__name__}: {error}", code=code, **facts)
    except (OSError, MmsslError) as second:  # a full disk must not hide the first cause
        print(f"mmssl: status.json could not be written: {second}", file=sys.stderr)


def leave(folder: RunFolder | None, peers: Peers) -> None:
    """End the process at a signal that comes before the first update, when there is nothing yet to be saved.

    It may be the launcher that sends it, since another rank has gone.
    """
    lost = peers.gone()
    go_on = "" if folder is None else f" Go on with: mmssl resume {folder.path}"
    text = str(peers.farewell(lost)) if lost else f"stopped by a signal before the first update.{go_on}"
    cause = peers.claim(RankError.code if lost else INTERRUPTED, text)
    if folder is not None:
        record_failure(folder, peers, cause.error())
    print(f"mmssl: {cause.text}", file=sys.stderr, flush=True)
    os._exit(cause.code)  # an exception could be taken for one of the library that it met


def finish(folder: Path) -> int:
    """Say where the results are; the exit status."""
    if rank() == 0:
        status = RunFolder.open(folder).read_status()["state"]
        if status == "preempted":
            print(f"Stopped by a signal and saved. Go on with: mmssl resume {folder}")
        else:
            scores = {n.split("/", 1)[1]: v for n, v in summary(folder).items() if n.startswith("probe/")}
            told = ", ".join(f"{name} {value:.1%}" for name, value in scores.items())
            print(f"The encoder is in {folder / 'model'}" + (f" ({told})." if told else "."))
            print(f"The report is {illustrated(folder)}")
    return 0


def illustrated(folder: Path) -> Path:
    """Draw the pictures of a finished run that cost little, unless its recipe says otherwise, and write its report again.

    An error is no more than a warning. Returns: the report.
    """
    from mmssl import report
    from mmssl.config import load_recipe
    from mmssl.report import figures

    path = folder / "report" / "index.html"
    try:
        if load_recipe(folder / "config.yaml").watch.pictures:
            figures.draw(folder, everything=False)
        report.write(folder)
    except Exception as error:  # whatever it is, the run itself has ended well
        print(f"mmssl: note: not all of {path} could be drawn: {type(error).__name__}: {error}", file=sys.stderr)
    return path


def summary(folder: Path) -> dict[str, Any]:
    """The last value of every metric of a run."""
    last: dict[str, Any] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    return last
