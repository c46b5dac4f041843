"""Errors a user can mend. Each carries the exit status that the contract gives it."""

from __future__ import annotations

import errno

INTERRUPTED = 130  # exit status, as a shell reports SIGINT


class MmsslError(Exception):
    """A failure with a sentence for the user: what is wrong, where, and the mend."""

    code = 8


class RecipeError(MmsslError):
    """The recipe or an argument is wrong (exit 2)."""

    code = 2


class DataError(MmsslError):
    """Too many samples are unreadable (exit 3)."""

    code = 3


class NonFiniteError(MmsslError):
    """Loss or gradients stayed non-finite (exit 4)."""

    code = 4


class CollapseError(MmsslError):
    """A health metric fell below what `watch.guard` asks for (exit 4)."""

    code = 4


class CheckpointError(MmsslError):
    """No usable checkpoint (exit 5)."""

    code = 5


class StorageError(MmsslError):
    """The run folder cannot be written (exit 6)."""

    code = 6


class RankError(MmsslError):
    """A rank hangs, or was lost to the others (exit 7)."""

    code = 7


def storage_error(error: BaseException, path: object) -> StorageError | None:
    """The sentence for a full or read-only disk, or None if `error` is something else.

    safetensors hides the errno of a failed write in its message, hence the look at the text.
    """
    number = getattr(error, "errno", None)
    text = str(error).lower()
    if number in (errno.ENOSPC, errno.EDQUOT) or "no space left" in text or "quota exceeded" in text:
        return StorageError(f"The disk under {path} is full. Free some space or choose another folder with out=FOLDER.")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or "permission denied" in text or "read-only file system" in text:
        return StorageError(f"{path} cannot be written. Give write permission or choose another folder with out=FOLDER.")
    return None
