"""Predictions as a picture: the support set, a row for each class, then each image with its label and probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 96
"""Pixels of a thumbnail's side."""
CELL = (SIDE + 16, SIDE + 52)
"""Width and height of an image with its two lines of text."""
COLUMNS = 10
MARGIN = 24
NAMES = 216
"""Width of the support set's labels, in pixels."""
COLOURS = ("#1f77b4", "#d95f02", "#2a9d3c", "#c2283c", "#7b4fb5", "#8c564b", "#d45fae", "#6b6b6b", "#9a9a12", "#1295a8")
INK, PALE, WRONG = "#202020", "#707070", "#c00000"

Thumbnail = NDArray[np.uint8]
"""`[3, SIDE, SIDE]`."""


@dataclass(frozen=True)
class Card:
    """An image that was predicted."""

    thumbnail: Thumbnail
    name: str
    label: str
    probability: float
    truth: str | None = None
    """its class, where that is known"""


def contact_sheet(
    title: str, support: Mapping[str, tuple[Sequence[Thumbnail], int]], cards: Sequence[Card], note: str
) -> Image.Image:
    """The picture.

    **Arguments:**

    - `title`: its first line.
    - `support`: thumbnails of each class, as many as are to be shown, and how many there are.
    - `cards`: the images, shown in this order in the order of their labels, the surest first.
    - `note`: what is said of the images, such as how many are not shown.
    """
    colours = {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(support)}
    order = {label: index for index, label in enumerate(support)}
    cards = sorted(cards, key=lambda card: (order[card.label], -card.probability))
    rows = -(-len(cards) // COLUMNS)
    top, middle = MARGIN + 40, MARGIN + 40 + 30 + len(support) * (SIDE + 12) + 20
    page = Image.new("RGB", (2 * MARGIN + COLUMNS * CELL[0], middle + 34 + rows * CELL[1] + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    _text(draw, (MARGIN, MARGIN), title, 18, INK, page.width - 2 * MARGIN, bold=True)
    _text(draw, (MARGIN, top), "Support set", 15, PALE)
    for row, (label, (thumbnails, count)) in enumerate(support.items()):
        y = top + 30 + row * (SIDE + 12)
        _text(draw, (MARGIN, y + SIDE // 2 - 10), label, 15, colours[label], NAMES - 12, bold=True)
        for column, thumbnail in enumerate(thumbnails):
            _paste(page, thumbnail, (MARGIN + NAMES + column * CELL[0], y), colours[label])
        if count > len(thumbnails):
            x = MARGIN + NAMES + len(thumbnails) * CELL[0]
            _text(draw, (x, y + SIDE // 2 - 10), f"and {count - len(thumbnails)} more", 13, PALE)
    _text(draw, (MARGIN, middle), note, 15, PALE, page.width - 2 * MARGIN)
    for index, card in enumerate(cards):
        x, y = MARGIN + index % COLUMNS * CELL[0], middle + 34 + index // COLUMNS * CELL[1]
        _card(page, draw, card, (x, y), colours[card.label])
    return page


def most_shown() -> int:
    """Support images of a class that fit beside its label, with room for how many there are more."""
    return COLUMNS - -(-NAMES // CELL[0]) - 1


def printable(text: str) -> str:
    """A file's name in one line."""
    return "".join(one if one.isprintable() else "?" for one in text)


def _card(page: Image.Image, draw: ImageDraw.ImageDraw, card: Card, at: tuple[int, int], colour: str) -> None:
    x, y = at
    _paste(page, card.thumbnail, at, colour)
    wrong = card.truth is not None and card.truth != card.label
    _text(draw, (x, y + SIDE + 5), card.label, 12, colour, SIDE, bold=True)
    end = _text(draw, (x, y + SIDE + 22), f"{100 * card.probability:.0f} %", 12, INK, bold=True) + 6
    beside = f"not {card.truth}" if wrong else Path(card.name).name
    _text(draw, (end, y + SIDE + 23), beside, 11, WRONG if wrong else PALE, x + SIDE - end)


def _paste(page: Image.Image, thumbnail: Thumbnail, at: tuple[int, int], colour: str) -> None:
    x, y = at
    ImageDraw.Draw(page).rectangle((x - 3, y - 3, x + SIDE + 2, y + SIDE + 2), fill=colour)
    page.paste(Image.fromarray(np.ascontiguousarray(thumbnail.transpose(1, 2, 0))), at)


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    colour: str,
    room: int | None = None,
    bold: bool = False,
) -> int:
    """Writes a line, shortened to `room` pixels; returns where it ends."""
    font, line = _font(size, bold), printable(text)
    shown = line
    while room is not None and shown and font.getlength(shown) > room:
        line = line[:-1]
        shown = f"{line}…" if line else ""
    draw.text(at, shown, fill=colour, font=font)
    return at[0] + int(font.getlength(shown))


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)
