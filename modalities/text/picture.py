"""Rebuilt text for people to look at."""

from __future__ import annotations

from typing import Any

from mmssl.types import Rebuilt

WIDTH, TOKENS = 110, 160  # characters of a line, tokens of a sample


def draw(rebuilt: Rebuilt, views: Any, features: Any) -> Any:
    """Each text with its hidden tokens in brackets, `[guess|truth]` where the guess is wrong; a figure with `save`."""
    texts = []
    for truth, guess, hidden in zip(rebuilt.truth.tolist(), rebuilt.guess.tolist(), rebuilt.hidden.tolist()):
        words = []
        for own, said, unseen in list(zip(truth, guess, hidden))[:TOKENS]:
            if own != features.pad_token_id:
                words.append(_shown(views.tokenizer, own, said) if unseen else _piece(views.tokenizer, own))
        texts.append("".join(words).strip())
    return _page([line for text in texts for line in [*_wrapped(text), ""]])


def _piece(tokenizer: Any, token: int) -> str:
    """As it stands in running text."""
    piece = tokenizer.convert_ids_to_tokens(token)
    return piece.replace("\u2581", " ").replace("\u0120", " ").removeprefix("##")


def _shown(tokenizer: Any, own: int, said: int) -> str:
    right, guess = _piece(tokenizer, own), _piece(tokenizer, said)
    gap = " " if right.startswith(" ") else ""
    return f"{gap}[{right.strip()}]" if own == said else f"{gap}[{guess.strip()}|{right.strip()}]"


def _wrapped(text: str) -> list[str]:
    return [text[i : i + WIDTH] for i in range(0, max(len(text), 1), WIDTH)]


class _Sheet:
    """A matplotlib figure that saves as pictures do."""

    def __init__(self, figure: Any):
        self.figure = figure

    def save(self, path: Any) -> None:
        self.figure.savefig(path, dpi=90)


def _page(lines: list[str]) -> _Sheet:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * 0.075, 0.17 * len(lines) + 0.3), facecolor="white")
    figure.text(0.01, 0.99, "\n".join(lines), family="monospace", size=8, va="top", parse_math=False)
    return _Sheet(figure)
