"""Keeps secrets out of everything that is written or shown."""

from __future__ import annotations

import os
import re

HIDDEN = "REDACTED"  # a plain word: it breaks neither YAML nor JSON
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|wandb_v1_\w{16,}|AKIA[A-Z0-9]{12,}"
    r"|sk-(?=[\w-]*\d)[\w-]{16,})"  # the digit spares words such as sk-learn
)
_NAMED = re.compile(
    r"""(?ix) ( [\w-]* (?: token | secret | passw(?:or)?d | api_?-?key ) ["']? \s*[=:]\s* ["']? ) [^\s"'&,;]{8,}
    | ( (?: key | token ) \b .{0,3}? \b ) [0-9a-f]{40}\b
    | ( \bbearer\s+ ) [\w.~+/=-]{8,}
    | ( \w+://[^\s/:@]*: ) [^\s/@]+ (?=@)"""
)
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY")


def redact(text: str) -> str:
    """The text without known shapes of tokens and without the values of secret-like environment variables."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name.upper()) and len(value) >= 8}
    for value in sorted(values, key=len, reverse=True):  # the longer first: one may hold the other
        text = text.replace(value, HIDDEN)
    text = _NAMED.sub(lambda found: next(group for group in found.groups() if group is not None) + HIDDEN, text)
    return _SHAPES.sub(HIDDEN, text)
