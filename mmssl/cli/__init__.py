"""`mmssl VERB`: one file a verb, imported when it is called.

A verb is a module with `run(arguments) -> int`. The first line of its docstring is its line in `mmssl --help`, the whole
docstring is `mmssl VERB --help`, followed by OPTIONS if it has any. It imports what is slow inside `run`. Nothing here may
import torch or pydantic.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import sys
import traceback
from collections.abc import Sequence

from mmssl import __version__
from mmssl.errors import INTERRUPTED, MmsslError, RecipeError, storage_error

# Equal to the first lines of the docstrings, as a test makes sure: reading ten files for --help would be slow.
VERBS = {
    "pretrain": "train an encoder: mmssl pretrain RECIPE [key=value ...]",
    "resume": "continue a run from its newest complete checkpoint",
    "check": "dry run: recipe, data, a few steps, memory, time; a plan for larger machines",
    "status": "how a run stands: mmssl status RUN",
    "view": "a page about a run, or about several: mmssl view RUN [RUN ...]",
    "replay": "the batch of an update that was not applied, sample by sample",
    "finetune": "labels for an encoder: mmssl finetune RECIPE model=MODEL data=LABELLED [key=value ...]",
    "probe": "k-NN and linear accuracy of a model on labelled data",
    "compare": "which of several models is better: mmssl compare A B [C ...] data=FOLDER",
    "embed": "features of a data set as parquet, npy or safetensors: mmssl embed MODEL data=... out=FILE",
    "measure": "the probes of a run again: mmssl measure RUN [key=value ...]",
    "export": "write the encoder of a run as a model folder",
    "convert": "a published data2vec checkpoint as a model folder: mmssl convert CHECKPOINT to=FOLDER",
    "push": "send the encoder of a run to the Hub: mmssl push RUN ORG/NAME",
    "data": "what a data set holds: mmssl data stats|scan PATH",
    "tokenizer": "learn a vocabulary: mmssl tokenizer train data=TEXTS out=FOLDER",
    "list": "what there is to choose from: mmssl list methods|models|recipes|modalities",
    "copy": "copy a shipped recipe to a file of your own: mmssl copy RECIPE FILE",
    "env": "versions, devices and what can run here",
}
INTERNAL, PIPE_CLOSED = 8, 141  # the latter as a shell reports SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: words after `mmssl`; those of the process if unset.
    Returns: exit status. No exception leaves here but SystemExit.
    """
    try:
        code = _call(sys.argv[1:] if argv is None else [*argv])
        sys.stdout.flush()  # here, not at exit, where nobody could catch a closed pipe
        return code
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except Exception as error:
        return PIPE_CLOSED if isinstance(error, BrokenPipeError) and _reader_gone() else _explain(error)


def _call(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_help())
        return 0
    verb, *rest = arguments
    if verb == "--version":
        print(f"mmssl {__version__}")
        return 0
    if verb not in VERBS:
        from mmssl.cli.options import nearest

        raise RecipeError(f"no verb is named {verb!r}{nearest(verb, VERBS)}; there are {', '.join(VERBS)}.")
    # No name of this package may be `list` or `copy`: importing a verb binds its module here.
    module = importlib.import_module(f"mmssl.cli.{verb}")
    if "--help" in rest or "-h" in rest:
        from mmssl.cli.options import describe

        print((module.__doc__ or "").strip() + describe(getattr(module, "OPTIONS", {})))
        return 0
    return module.run(rest)


def _help() -> str:
    lines = [f"  {verb:10}{line}" for verb, line in VERBS.items()]
    return "\n".join(
        ["usage: mmssl VERB [key=value ...]", "", *lines, "", "mmssl VERB --help tells more; mmssl --version the version."]
    )


def _explain(error: Exception) -> int:
    """One paragraph instead of a traceback, and the exit status of the contract."""
    path = getattr(error, "filename", None) or "the output folder"
    told = error if isinstance(error, MmsslError) else None
    if told is None and (isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
        told = storage_error(error, path)
    if told is not None:
        return _say(str(told), told.code)
    from mmssl.training.run_folder import save_traceback

    where = save_traceback("".join(traceback.format_exception(error)))
    line = traceback.format_exception_only(error)[-1].strip()
    return _say(f"internal error: {line}" + (f"\nThe traceback is in {where}." if where else ""), INTERNAL)


def _say(text: str, code: int) -> int:
    from mmssl.training.run_folder import redact

    with contextlib.suppress(BrokenPipeError):
        print(f"mmssl: {redact(text)}", file=sys.stderr)
    return code


def _reader_gone() -> bool:
    """Whether it was our own output whose reader left, as in `mmssl list methods | head -1`, and not some worker's pipe."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # stdout is closed or is no file
        return False
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
    return True
