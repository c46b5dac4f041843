"""Rebuilt text for people to look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmssl.types import Rebuilt, View

WIDTH, TOKENS, LEAST = 110, 100, 8  # characters of a line; tokens of a sample; characters that a guess may have
COLUMNS, FEW = 74, 24  # characters of a line of a text that stands alone; tokens of it without colours
SIZE, LINE, MARGIN = 12, 16, 8  # pixels: of letters, from line to line, around all
BLACK, GREY, MARKED, RIGHT, WRONG = "#000000", "#808080", "#dcdcdc", "#007d2a", "#c4001d"


class Cell(NamedTuple):
    """A token, and below it what was seen and said in its place."""

    own: str
    seen: str  # "" where it was seen as it is, or not at all
    said: str  # "" where nothing was asked
    right: bool
    gap: int  # characters before it

    @property
    def width(self) -> int:
        """In characters, whatever was said, so that pictures of one sample are laid out alike."""
        return self.gap + max(len(self.own), LEAST if self.said else 1)


def draw(rebuilt: Rebuilt, views: Any, features: Any) -> Image.Image:
    """The text, hidden tokens on grey. Below them, in grey, what was seen in their places where it was something else; and what
    was guessed, green if right, red if wrong.
    """
    lines = 2 + (rebuilt.seen is not None)
    texts = [[*wrapped(cells)] for cells in _cells(rebuilt, views, features)]
    font = ImageFont.truetype(str(_font()), SIZE)
    step = font.getlength("0")
    height = sum(len(rows) * (lines * LINE + LINE // 2) + LINE // 2 for rows in texts)
    sheet = Image.new("RGB", (round(WIDTH * step) + 2 * MARGIN, height + 2 * MARGIN), "white")
    pen, top = ImageDraw.Draw(sheet), MARGIN
    for rows in texts:
        for row in rows:
            place = 0
            for cell in row:
                left = MARGIN + (place + cell.gap) * step
                if cell.said:
                    pen.rectangle((left, top, left + len(cell.own) * step, top + LINE - 2), fill=MARKED)
                pen.text((left, top), cell.own, BLACK, font)
                room = cell.width - cell.gap
                pen.text((left, top + LINE), _cut(cell.seen, room), GREY, font)
                pen.text((left, top + (lines - 1) * LINE), _cut(cell.said, room), RIGHT if cell.right else WRONG, font)
                place += cell.width
            top += lines * LINE + LINE // 2
        top += LINE // 2
    return sheet


def _cells(rebuilt: Rebuilt, views: Any, features: Any) -> Iterator[list[Cell]]:
    """Those of each sample."""
    known = rebuilt.truth if rebuilt.seen is None else rebuilt.seen
    for rows in zip(*(each.tolist() for each in (rebuilt.truth, known, rebuilt.guess, rebuilt.hidden))):
        cells = []
        for own, seen, said, hidden in list(zip(*rows))[:TOKENS]:
            if own != features.pad_token_id:
                shown = [_piece(views.tokenizer, one) for one in (own, seen, said)]
                gap = int(bool(views.pieces.opens[own]) and bool(cells))
                cells.append(Cell(shown[0], shown[1] if seen != own else "", shown[2] if hidden else "", own == said, gap))
        yield cells


def _piece(tokenizer: Any, token: int) -> str:
    """Without the marks of where words begin; at least one character."""
    piece = tokenizer.convert_ids_to_tokens(token)
    return piece.replace("\u2581", " ").replace("\u0120", " ").removeprefix("##").strip() or "_"


def wrapped(cells: list[Cell]) -> Iterator[list[Cell]]:
    """Rows that fit the width; one at least."""
    row: list[Cell] = []
    for cell in cells:
        if row and sum(other.width for other in row) + cell.width > WIDTH:
            yield row
            row, cell = [], cell._replace(gap=0)
        row.append(cell)
    yield row


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "\u2026"


def _font() -> Path:
    """DejaVu Sans Mono, which comes with matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"


def sketch(view: View, views: Any, features: Any, colours: Tensor | None = None) -> list[Image.Image]:
    """The first tokens of each text of a plain view, on the colours of theirs, (B, L, 3) in 0..1, if they are given."""
    font = ImageFont.truetype(str(_font()), SIZE)
    return [_page(*each, views, font) for each in _texts(view, colours)]


def _texts(view: View, colours: Tensor | None) -> Iterator[tuple[list[int], list[list[float]] | None]]:
    """Ids of each text that are shown, and their colours."""
    for row, ids in enumerate(view.x):
        own = ids if view.pad is None else ids[~view.pad[row]]
        shown = min(len(own), TOKENS if colours is not None else FEW)
        yield own[:shown].tolist(), None if colours is None else colours[row, :shown].tolist()


def _page(ids: list[int], colours: list[list[float]] | None, views: Any, font: Any) -> Image.Image:
    step, places, left, top = font.getlength("0"), [], 0, 0
    for token in ids:
        piece = _piece(views.tokenizer, token)[:COLUMNS]
        left += int(bool(views.pieces.opens[token]) and left > 0)
        if left + len(piece) > COLUMNS:
            left, top = 0, top + LINE
        places.append((piece, left * step, top))
        left += len(piece)
    sheet = Image.new("RGB", (round(COLUMNS * step), top + LINE), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (piece, x, y) in enumerate(places):
        if colours is not None:  # pale, so that letters can be read
            pale = tuple(round(255 * (0.45 + 0.55 * part)) for part in colours[place])
            pen.rectangle((x, y, x + len(piece) * step, y + LINE - 2), fill=pale)
        pen.text((x, y), piece, BLACK, font)
    return sheet
