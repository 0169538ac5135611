"""Draw the floors of the package, from the table in ARCHITECTURE.md.

python scripts/architecture_picture.py docs/architecture.svg

A box for each folder and file of the table, the lowest floor at the bottom, with what it is for: in the words below, or
in the first ones of the table.
"""

from __future__ import annotations

import re
import sys
import textwrap
from html import escape
from pathlib import Path

TABLE = Path(__file__).parents[1] / "ARCHITECTURE.md"
WIDTH, LEFT, GAP, HEIGHT = 860, 70, 10, 58
"""Pixels: of the picture, of the column with the floors' numbers, between boxes, and of a box."""
COLOURS = ("#f3f4f6", "#e0ecff", "#e2f5e9", "#fff3d6", "#fde4e1", "#efe6fb")
LINES = 2
IN_SHORT = {
    "rules/": "the paper's equations, a file a rule",
    "models/": "Conv4, ResNet12, and their block for CPUs",
    "data/": "images by class, a loader a dataset",
    "engine/": "how a batch of tasks runs: one by one, vmap, compiled, recorded",
    "verification/": "is a foreign model differentiated rightly?",
    "learners.py": "MetaLearner, MAML, SharpMAML, MetaAgnosticSAM",
    "analysis/": "what weights look like from the rules' point of view",
    "training/": "a run: settings, folder, checkpoints, the loop, the test",
    "reproduce/": "plans of runs, their ledger, and the pages made from it",
    "classifier.py": "a run's weights fitted to one's own images",
}

Room = tuple[str, str]
"""Its names, and what it knows."""


def floors(text: str) -> dict[int, list[Room]]:
    """The rooms by floor, as the table has them."""
    found: dict[int, list[Room]] = {}
    for floor, names, knows in re.findall(r"^\| (\d+) \| ([^|]+) \| (.+) \|$", text, re.MULTILINE):
        found.setdefault(int(floor), []).append((", ".join(re.findall(r"`([^`]+)`", names)), knows))
    return found


def picture(rooms: dict[int, list[Room]]) -> str:
    """The drawing as SVG."""
    top = max(rooms)
    height = (top + 1) * (HEIGHT + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>The floors of fewshot_asam: a file imports only from floors below its own</title>",
        '<marker id="tip" markerWidth="8" markerHeight="8" refX="4" refY="4" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#6b7280"/></marker>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<line x1="14" y1="{GAP}" x2="14" y2="{height - GAP}" stroke="#6b7280" marker-end="url(#tip)"/>',
        f'<text transform="translate(30 {height / 2}) rotate(-90)" {_style(12, "#6b7280", "middle")}>imports</text>',
    ]
    for floor, row in rooms.items():
        y = GAP + (top - floor) * (HEIGHT + GAP)
        parts.append(_text(LEFT - 18, y + HEIGHT / 2 + 5, str(floor), 14, "#6b7280", anchor="middle"))
        width = (WIDTH - LEFT - GAP * len(row)) / len(row)
        for number, room in enumerate(row):
            parts += _box(LEFT + number * (width + GAP), y, width, room, COLOURS[floor % len(COLOURS)])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(x: float, y: float, width: float, room: Room, colour: str) -> list[str]:
    names, knows = room
    box = f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{HEIGHT}" rx="6" fill="{colour}" stroke="#9ca3af"/>'
    lines = textwrap.wrap(
        IN_SHORT.get(names) or _first_words(knows), int(width / 6.2), max_lines=LINES, placeholder=" …"
    )
    caption = [_text(x + 10, y + 36 + 14 * n, line, 11.5, "#374151") for n, line in enumerate(lines)]
    return [box, _text(x + 10, y + 19, names, 14, "#111827", weight="bold"), *caption]


def _first_words(knows: str) -> str:
    """What a room knows, to the first semicolon, without Markdown."""
    return re.split(r"; | \(", knows.replace("`", ""))[0]


def _text(
    x: float, y: float, text: str, size: float, colour: str, anchor: str = "start", weight: str = "normal"
) -> str:
    return f'<text x="{x:g}" y="{y:g}" {_style(size, colour, anchor, weight)}>{escape(text)}</text>'


def _style(size: float, colour: str, anchor: str, weight: str = "normal") -> str:
    return f'font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}"'


def main() -> None:
    """The command."""
    if len(sys.argv) != 2:
        sys.exit("architecture_picture: expected the SVG file to write, such as docs/architecture.svg")
    Path(sys.argv[1]).write_text(picture(floors(TABLE.read_text("utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
