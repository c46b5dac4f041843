"""Checkpoints on disk: whole or absent, and the old ones stay until the new one is durable.

    checkpoints/step-00012000/         model.safetensors  optimizer.safetensors ...  state.json
                                       manifest.json: format, step, size and SHA-256 of each file; written last
    checkpoints/.tmp-step-00013000-*/  being written
    checkpoints/.del-step-00011000-*/  being removed

The newest folder whose files match its manifest is the latest: no pointer file can name a broken one. Nothing here is
pickled, knows ranks or the trainer, or needs torch before tensors move. One process at a time writes to a root.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmssl.errors import CheckpointError, StorageError, disk_full
from mmssl.training.durable import safetensors, write, write_all
from mmssl.training.run_folder import storing, sync, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST, STATE, SUFFIX = "manifest.json", "state.json", ".safetensors"
TRIED, TRIES = "tries", 2  # not in the manifest: it changes; how often a checkpoint is tried before an older one is
SPARE = 1.1  # of what a checkpoint needs, that must be free
_NAME = re.compile(r"step-(\d{8,})(\.old)?")  # .old: set aside while a new checkpoint of the same step takes its place


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    also_keep: Collection[int] = (),
) -> Path:
    """Write a checkpoint, then remove those that are no longer needed.

    Args:
        root: folder of the checkpoints of one run; made if missing.
        step: updates applied; names the checkpoint.
        tensors: file name without suffix ("model", "optimizer") -> name -> tensor, of any device and layout.
        state: what JSON can hold; tuples come back as lists, keys as strings.
        keep: newest checkpoints that stay, this one included. Broken ones do not count; those of later steps go too,
            as they belong to a history that the run has left.
        also_keep: steps that stay as well.
    Returns: the folder of the checkpoint, `root/step-XXXXXXXX`.
    Raises: StorageError if the disk is full or read-only; older checkpoints are then untouched. ValueError or TypeError
        if `state` or a name cannot be written, before anything is.
    """
    if keep < 1 or step < 0 or not all(re.fullmatch(r"[\w-]+", name) for name in tensors):
        raise ValueError(f"checkpoint: keep {keep}, step {step}, file names {list(tensors)}; expected >= 1, >= 0, plain words")
    text = json.dumps(dict(state)).encode()
    files = {f"{name}{SUFFIX}": safetensors(group) for name, group in tensors.items()}
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) + len(text) + 65536
    final = place(root, step)
    temporary = root / f".tmp-{final.name}-{secrets.token_hex(4)}"
    with storing(root, needed):
        root.mkdir(parents=True, exist_ok=True)
        _make_room(root, int(needed * SPARE), keep, also_keep)
        try:
            temporary.mkdir()
            _write(temporary, step, {**files, STATE: [text]})
            _make_way(final)
            temporary.rename(final)
            sync(root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if reason := problem(final, hashes=False):
            raise StorageError(f"{final} was written but cannot be read back: {reason}.")
        _rotate(root, final, keep, also_keep)
    return final


def find(root: Path, hashes: bool = True, most: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest usable checkpoint.

    One from which the run was resumed twice without getting through an update (see `note_try`) is suspect: an older one is
    preferred to it, where there is one.

    Args:
        root: folder of the checkpoints; may be missing.
        hashes: read all files and compare their SHA-256; otherwise only sizes.
        most: the highest step that is of interest; all if None.
    Returns: its folder or None, and for each newer one that was rejected "FOLDER: reason".
    """
    reasons, suspect = [], None
    for path in _candidates(root):
        if most is not None and step_of(path) > most:
            continue
        reason = problem(path, hashes)
        if reason is None and tries(path) < TRIES:
            return path, reasons
        suspect = suspect or (path if reason is None else None)
        reasons.append(f"{path.name}: {reason or f'resumed {TRIES} times without getting through an update'}")
    return suspect, reasons


def tries(path: Path) -> int:
    """How often a run was resumed from it, since it last got through an update from there."""
    try:
        return int((path / TRIED).read_text())
    except (OSError, ValueError):
        return 0


def note_try(path: Path) -> None:
    """A run is about to go on from it. Raises: StorageError."""
    with storing(path):
        write_atomic(path / TRIED, f"{tries(path) + 1}\n")


def forget_tries(path: Path) -> None:
    """The run got through an update from there."""
    with suppress(OSError):  # it may have been removed meanwhile
        (path / TRIED).unlink()


def written(root: Path) -> bool:
    """Whether a checkpoint was ever finished here, usable or not."""
    return bool(_candidates(root))


def newest(root: Path) -> Path | None:
    """The newest usable checkpoint, or None."""
    return find(root)[0]


def newest_or_fail(root: Path) -> Path | None:
    """The newest usable checkpoint; None only where none was ever written, since nobody wants a silent restart.

    Raises: CheckpointError if there are checkpoints and none can be used.
    """
    path, reasons = find(root)
    if path is None and reasons:
        raise CheckpointError(f"{root}: no usable checkpoint. " + "; ".join(reasons) + ". Start anew with overwrite=true.")
    return path


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint that `find` has verified.

    Returns: tensors on the CPU as they were given to `save`, and the state.
    Raises: CheckpointError if a file is missing, of another size or unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if reason := problem(path, hashes=False):
        raise CheckpointError(f"{path}: {reason}.")
    names = [name.removesuffix(SUFFIX) for name in _manifest(path)["files"] if name.endswith(SUFFIX)]
    try:
        return {name: load_file(path / f"{name}{SUFFIX}") for name in names}, state_of(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def state_of(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors. Raises: CheckpointError if it cannot be read."""
    try:
        return json.loads((path / STATE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def step_of(path: Path) -> int:
    """Updates applied when that checkpoint was written."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(found[1])


def place(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, if there is one."""
    return root / f"step-{step:08d}"


def drop_after(path: Path) -> None:
    """Remove the checkpoints of later steps: the run went back, and they are of a history that it left."""
    for other in _candidates(path.parent):
        if step_of(other) > step_of(path):
            _remove(other)


def clean(root: Path) -> None:
    """Remove what an interrupted save or rotation left in this root. For the writing process, before its first save."""
    for leftover in (*root.glob(".tmp-step-*"), *root.glob(".del-step-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def problem(path: Path, hashes: bool = True) -> str | None:
    """Why a checkpoint cannot be used, naming the file; None if it can."""
    try:
        manifest = _manifest(path)
        if manifest["format"] != FORMAT:
            return f"{MANIFEST}: format {manifest['format']!r}, this version reads {FORMAT}"
        if manifest["step"] != step_of(path):
            return f"{MANIFEST}: is of step {manifest['step']!r}"
        if STATE not in manifest["files"]:
            return f"{MANIFEST}: lists no {STATE}"
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST}: not readable ({type(error).__name__}: {error})"
    for name, (size, digest) in listed.items():
        if name != Path(name).name:
            return f"{MANIFEST}: {name!r} lies elsewhere"
        try:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name}: {found} bytes, expected {size}"
            if hashes and _sha256(path / name) != digest:
                return f"{name}: SHA-256 differs"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


# Steps of the protocol ----------------------------------------------------------------------------------------------


def _candidates(root: Path) -> list[Path]:
    """All checkpoints, newest first, whole or not."""
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix != ".old"), reverse=True)


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text("utf-8"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_room(root: Path, needed: int, keep: int, also_keep: Collection[int]) -> None:
    """Remove what is outside of what stays if there is too little space. Raises: StorageError if that does not help."""
    if shutil.disk_usage(root).free >= needed:
        return
    newest = find(root, hashes=False)[0]
    if newest is not None:
        clean(root)
        _rotate(root, newest, keep, also_keep)
    if shutil.disk_usage(root).free < needed:
        raise disk_full(root, needed)


def _write(folder: Path, step: int, files: Mapping[str, Iterable[Any]]) -> None:
    """All files, each durable; the manifest, which makes them a checkpoint, last."""
    written = write_all({folder / name: pieces for name, pieces in files.items()})
    entries = {name: file._asdict() for name, file in sorted(written.items())}
    manifest = json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1)
    write(folder / MANIFEST, [manifest.encode()])
    sync(folder)


def _make_way(final: Path) -> None:
    """Set a checkpoint of the same step aside. As `.old` it can still be found should the process end before the rename."""
    if not final.exists():
        return
    if problem(final) is not None:
        _remove(final)
        return
    aside = final.with_name(f"{final.name}.old")
    if aside.exists():
        _remove(aside)
    final.rename(aside)


def _remove(path: Path) -> None:
    """First out of sight, then off the disk: half a checkpoint never bears the name of one."""
    doomed = path.with_name(f".del-{path.name}-{secrets.token_hex(4)}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _rotate(root: Path, final: Path, keep: int, also_keep: Collection[int]) -> None:
    usable: dict[int, Path] = {}  # newest first
    for path in _candidates(root):
        if step_of(path) < step_of(final) and problem(path, hashes=False) is None:
            usable.setdefault(step_of(path), path)
    kept = {final, *list(usable.values())[: keep - 1], *(path for step, path in usable.items() if step in also_keep)}
    for path in _candidates(root):
        if path not in kept:
            _remove(path)
