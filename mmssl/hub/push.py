"""A model folder to the Hub, in one commit: whoever loads it has the old model or the new one, never a mixture."""

from __future__ import annotations

import hashlib
import json
import re
import time
from fnmatch import fnmatch
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from mmssl.errors import MmsslError, RecipeError

WAITS = (1.0, 5.0)  # seconds before another try; the client itself tries most calls several times
# What an export writes, and no user adds; an adapter's weights beside the model's are not of these.
EXPORTED = ("model*.safetensors", "model.safetensors.index.json", "modeling_mmssl.py", "preprocessor_config.json",
            "processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
HELP = {
    HTTPStatus.UNAUTHORIZED: "the token is not accepted; log in with `hf auth login`, or set HF_TOKEN",
    HTTPStatus.FORBIDDEN: "the token may not write there; take one with write access, and an ORG that you belong to",
    HTTPStatus.NOT_FOUND: "there is no such place, or the token may not see it; check ORG/NAME",
}


class Plan(NamedTuple):
    """What would be sent."""

    files: dict[str, bytes | Path]  # name -> content
    title: str  # of the commit; names the content

    def listing(self) -> str:
        """A line for each file, with its size."""
        sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in self.files.items()}
        return "\n".join(f"  {name}  {size:,} bytes" for name, size in sizes.items())


def plan(model: Path, repo: str) -> Plan:
    """Read a model folder; its card is told where it will be.

    Raises: RecipeError if the folder holds no model, or something that does not belong to one.
    """
    found = _contents(model)
    files: dict[str, bytes | Path] = {file.relative_to(model).as_posix(): file for file in found}
    for card in (file for file in found if file.name == "README.md"):
        there = f'"{repo}"' if card.parent == model else f'"{repo}", subfolder="{card.parent.name}"'
        files[card.relative_to(model).as_posix()] = card.read_text("utf-8").replace('"PATH"', there).encode()
    digest = hashlib.sha256()
    for name, data in files.items():
        if isinstance(data, bytes):
            inner = hashlib.sha256(data)
        else:
            with data.open("rb") as file:
                inner = hashlib.file_digest(file, "sha256")
        digest.update(f"{name}\0{inner.hexdigest()}\0".encode())
    return Plan(files, f"Encoder by mmssl, {digest.hexdigest()[:16]}")


def _contents(model: Path) -> list[Path]:
    """The files of a model folder, and of those for each kind of data in it. Raises: RecipeError if it is none."""
    inside = sorted(model.iterdir()) if model.is_dir() else []
    names = [file.name for file in inside]
    several = [file.name for file in inside if (file / "config.json").is_file()]
    if several and "config.json" not in names:
        raise RecipeError(
            f"{model} holds a model for each of {', '.join(several)} and none of all; push one, such as {model / several[0]}, "
            "or write one of all with `mmssl export RUN to=FOLDER`."
        )
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise RecipeError(f"{model} holds no model (config.json and *.safetensors); `mmssl export RUN to=FOLDER` writes one.")
    members = [file for file in inside if file.name in _members(model) and file.is_dir() and not file.is_symlink()]
    found = [f for f in inside if f not in members] + [file for folder in members for file in sorted(folder.iterdir())]
    if odd := [str(file.relative_to(model)) for file in found if file.is_symlink() or not file.is_file()]:
        raise RecipeError(f"{model}: {', '.join(odd)} is no plain file, and nothing is sent; push a folder of plain files.")
    return found


def _members(model: Path) -> list[str]:
    """Names of the kinds of data that a model takes, if there are several: each has a folder in its own."""
    try:
        told = json.loads((model / "config.json").read_text("utf-8"))
    except (OSError, ValueError):  # what loads it will say so
        return []
    members = told.get("members") if isinstance(told, dict) else None
    return [*members] if isinstance(members, dict) else []


def push(model: Path, repo: str, private: bool = True, endpoint: str | None = None) -> str:
    """Send a model folder, unless the newest commit there is of the same content.

    Files of an earlier export that this one does not have are removed in the same commit, from the folders that it has; what
    else is there stays.

    Args:
        repo: ORG/NAME; made if it does not exist.
        private: of a new repository; one that exists stays as it is.
        endpoint: address of the Hub; that of HF_ENDPOINT or the public one if None.
    Returns: address of the model.
    Raises: RecipeError for what the user can mend, MmsslError if the Hub fails.
    """
    content = plan(model, repo)
    api = _client(repo, endpoint)
    for wait in (*WAITS, 0.0):
        try:
            _send(api, content, repo, private)
            return f"{api.endpoint}/{repo}"
        except Exception as error:  # the client's transport has errors of its own, which differ between its versions
            if (told := _mendable(repo, error)) is not None:
                raise told from None
            status = _status(error)
            final = not wait or (status is not None and status < 500 and status != HTTPStatus.PRECONDITION_FAILED)
            if final or not (status or _is_transport(error)):
                raise _failed(repo, content, error) from None
            time.sleep(wait)
    raise AssertionError


def check(repo: str, private: bool = True, endpoint: str | None = None) -> None:
    """Whether a model could be pushed: the repository is made if it does not exist, and nothing is sent.

    Raises: RecipeError with the reason if not.
    """
    api = _client(repo, endpoint)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.auth_check(repo, write=True)
    except Exception as error:  # as in `push`
        raise _mendable(repo, error) or RecipeError(f"{repo}: the Hub cannot be reached: {_reason(error)}.") from None


def _client(repo: str, endpoint: str | None) -> HfApi:
    """With the user's token. Raises: RecipeError if there is none, or no such name."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise RecipeError(f"{repo!r} is no name on the Hub; write ORG/NAME, such as my-lab/my-encoder.")
    if not (token := get_token()):
        raise RecipeError("There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN to one that may write.")
    return HfApi(endpoint=endpoint, token=token)


def _mendable(repo: str, error: Exception) -> RecipeError | None:
    """What the user can do about an error, None if nothing."""
    if isinstance(error, HFValidationError):
        return RecipeError(f"{repo}: {error}")
    if isinstance(error, OfflineModeIsEnabled):
        return RecipeError("HF_HUB_OFFLINE is set, and nothing can be sent; unset it.")
    status = _status(error)
    return RecipeError(f"{repo}: {HELP[HTTPStatus(status)]}. Nothing was changed.") if status in HELP else None


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _send(api: HfApi, content: Plan, repo: str, private: bool) -> None:
    """One try. It begins with a look at what is there: the answer to an earlier one may have been lost."""
    api.create_repo(repo, private=private, exist_ok=True)
    there = api.model_info(repo)
    commits = api.list_repo_commits(repo)
    if commits and commits[0].title == content.title:
        return
    old = [Path(file.rfilename) for file in there.siblings or ()]
    folders = {Path(name).parent for name in content.files}
    mine = [n.as_posix() for n in old if n.parent in folders and any(fnmatch(n.name, pattern) for pattern in EXPORTED)]
    stale = [name for name in mine if name not in content.files]
    api.create_commit(
        repo,
        [*(CommitOperationAdd(n, data) for n, data in content.files.items()), *(CommitOperationDelete(n) for n in stale)],
        commit_message=content.title,
        parent_commit=there.sha,  # another who writes meanwhile makes this fail, and be tried again
    )


def _is_transport(error: Exception) -> bool:
    """Whether a connection failed, under whatever name the client's transport gives it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError"})


def _failed(repo: str, content: Plan, error: Exception) -> MmsslError:
    return MmsslError(
        f"{repo}: the Hub could not be written: {_reason(error)}. The same command tries again. What is there is the old "
        f"model, or all of the new one if its last commit says {content.title!r}."
    )


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
