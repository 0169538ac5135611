"""Glyphs, the dataset that needs no download: characters of many scripts in matplotlib's fonts, warped as hands do.

A class is a character; its drawings differ in face, weight, slant, stroke width, and in an affine and an elastic
warp. A script lies wholly in one split, and no two classes look alike, in whichever script they are.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from fewshot_asam.data.cache import SPLITS, cached, fingerprint
from fewshot_asam.data.images import Dataset, ImageSet

DRAWINGS = 20  # a class
SIDE = 28  # pixels of a drawing

SCRIPTS = {
    "train": ("LATIN", "GREEK", "CYRILLIC", "COPTIC", "CANADIAN", "MATHEMATICAL"),
    "val": ("ARABIC", "DINGBAT"),
    "test": ("GEORGIAN", "ARMENIAN", "HEBREW", "TIFINAGH", "NKO", "LAO", "OLD"),
}
SYMBOLS = {"MATHEMATICAL": range(0x2200, 0x2300), "DINGBAT": range(0x2700, 0x27C0)}  # every other script is letters

# Each face and the widest pen, as a share of the glyph's longer side, with which its outlines are gone over.
FACES = {
    "DejaVuSans": 0.04,
    "DejaVuSans-Bold": 0.01,
    "DejaVuSans-Oblique": 0.04,
    "DejaVuSansMono": 0.04,
    "DejaVuSerif": 0.03,
    "DejaVuSerif-Bold": 0.01,
    "DejaVuSerif-Italic": 0.03,
    "STIXGeneral": 0.04,
    "STIXGeneralItalic": 0.04,
}
EM = 96  # pixels
LEAST = 30  # pixels of the longer side of a glyph that is more than a dot
CANVAS = 64  # pixels of an undeformed glyph's square
FILL = 56  # pixels of its longer side there
ALIKE = 0.92  # cosine between two blurred glyphs from which they are lookalikes

# The most of each random choice: radians, shear, log of the stretch, and lengths where half the square is 1. `shift` is
# a share of the room that is left, and `gain` darkens the thin strokes that 28 pixels would make grey.
MARGIN = 0.04  # stays paper at each edge
WARP = {"angle": 0.2, "slant": 0.3, "stretch": 0.18, "shrink": 0.2, "shift": 0.8, "elastic": 0.15, "gain": 1.3}


def load(root: Path | None = None, *, seed: int = 0) -> Dataset:
    """At least 1,000 characters with 20 drawings each, uint8 `[n, 1, 28, 28]`, ink 255 on paper 0.

    The classes are always the same and named `SCRIPT/CODEPOINT`; the drawings follow from `seed` alone. The first
    call takes some seconds, later ones read the cache.

    **Arguments:**

    - `root`: taken because every loader is given it; nothing is read from it.
    - `seed`: of all random choices.
    """
    key = fingerprint(
        map(_font_file, FACES), DRAWINGS, SIDE, SCRIPTS, SYMBOLS, FACES, EM, LEAST, CANVAS, FILL, ALIKE, WARP, seed
    )
    return cached("glyphs", key, lambda: _build(distinct(), seed))


@dataclass(frozen=True)
class Glyph:
    """One character: its code point, its script, and the faces that have it."""

    code: int
    script: str
    faces: tuple[str, ...]

    @property
    def name(self) -> str:
        """The class name."""
        return f"{self.script}/{self.code:04X}"


def candidates() -> list[Glyph]:
    """The characters of `SCRIPTS` that the faces have, script by script, but for composed, accented and tiny ones."""
    coverage = {face: FT2Font(str(_font_file(face))).get_charmap().keys() for face in FACES}
    order = {script: rank for rank, script in enumerate(s for split in SPLITS for s in SCRIPTS[split])}
    glyphs = [
        Glyph(code, script, tuple(face for face in FACES if code in coverage[face]))
        for code in sorted(set().union(*coverage.values()))
        if (script := _script(chr(code))) in order
    ]
    sizable = (glyph for glyph in glyphs if max(_ink(chr(glyph.code), glyph.faces[0]).size) >= LEAST)
    return sorted(sizable, key=lambda glyph: order[glyph.script])


def _script(character: str) -> str | None:
    if unicodedata.decomposition(character):
        return None
    category = unicodedata.category(character)
    if category in ("Lu", "Ll", "Lo"):
        return unicodedata.name(character).split()[0]
    blocks = (script for script, block in SYMBOLS.items() if ord(character) in block)
    return next(blocks, None) if category in ("Sm", "So") else None


def distinct() -> list[Glyph]:
    """The candidates without those that look, in one upright or slanted face or another, like an earlier one."""
    glyphs = candidates()
    faces = [(i, face) for i, glyph in enumerate(glyphs) for face in glyph.faces if "Bold" not in face]
    alike = lookalikes(torch.stack([_render(chr(glyphs[i].code), face, 0) for i, face in faces]))
    owner = torch.tensor([i for i, _ in faces])
    pairs = torch.zeros(len(glyphs), len(glyphs), dtype=torch.bool)
    pairs[tuple(owner[index] for index in alike.nonzero(as_tuple=True))] = True
    kept: list[int] = []
    for i in range(len(glyphs)):
        if not pairs[i, kept].any():
            kept.append(i)
    return [glyphs[i] for i in kept]


def lookalikes(prints: Tensor) -> Tensor:
    """bool `[n, n]`: which pairs of undeformed glyphs, uint8 `[n, CANVAS, CANVAS]`, differ less than `ALIKE` allows.

    Blurred glyphs are compared by the cosine between them, in whole numbers small enough for sums to be exact.
    """
    coarse = functional.avg_pool2d(prints.unsqueeze(1).float() / 16, 2)
    blurred = functional.avg_pool2d(coarse, 3, stride=1, padding=1).round().flatten(1)
    lengths = blurred.square().sum(1).sqrt()
    return (blurred @ blurred.T) / lengths >= ALIKE * lengths.unsqueeze(1)


@cache
def _font_file(face: str) -> Path:
    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")


@cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_file(face)), EM, layout_engine=ImageFont.Layout.BASIC)


def _ink(character: str, face: str, pen: int = 0) -> Image.Image:
    """The character at `EM` pixels, gone over with a pen that reaches `pen` pixels outwards; cropped to its ink."""
    page = Image.new("L", (3 * EM, 3 * EM))
    ImageDraw.Draw(page).text((EM, EM), character, fill=255, font=_font(face), stroke_width=pen)
    return page.crop(page.getbbox())


def _render(character: str, face: str, pen: float) -> Tensor:
    """uint8 `[CANVAS, CANVAS]`: the character in the middle, its longer side `FILL`, and the pen a share of that."""
    glyph = _ink(character, face)
    width = round(pen * max(glyph.size))
    if width:
        glyph = _ink(character, face, width)
    scale = FILL / max(glyph.size)
    size = max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))
    glyph = glyph.resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(glyph, ((CANVAS - glyph.width) // 2, (CANVAS - glyph.height) // 2))
    return torch.from_numpy(np.array(canvas))


def draw(glyphs: Sequence[Glyph], generator: torch.Generator) -> Tensor:
    """uint8 `[len(glyphs) * DRAWINGS, 1, SIDE, SIDE]`: the drawings of the first glyph, then those of the next."""
    choices = torch.rand(len(glyphs), DRAWINGS, 2, generator=generator).tolist()
    prints = torch.stack(
        [_print(glyph, *choice) for glyph, of_glyph in zip(glyphs, choices, strict=True) for choice in of_glyph]
    )
    return torch.cat([_warp(batch, generator) for batch in torch.split(prints, 2000)])


def _print(glyph: Glyph, face_choice: float, pen_choice: float) -> Tensor:
    face = glyph.faces[int(face_choice * len(glyph.faces))]
    return _render(chr(glyph.code), face, pen_choice * FACES[face])


def _warp(prints: Tensor, generator: torch.Generator) -> Tensor:
    """Each glyph, uint8 `[n, CANVAS, CANVAS]`, in a random pose that leaves it whole: uint8 `[n, 1, SIDE, SIDE]`."""
    n = len(prints)
    pose, half = _pose(n, generator), _half_extent(prints)
    reach = (pose.abs() @ half.unsqueeze(-1)).squeeze(-1)  # [n, 2]
    room = 1 - MARGIN - WARP["elastic"]
    size = (room - WARP["shrink"] * _uniform((n,), generator).add(1).div(2)) / reach.amax(1)
    slack = room - reach * size.unsqueeze(1)
    shift = WARP["shift"] * slack * _uniform((n, 2), generator)
    wave = WARP["elastic"] * _uniform((n, 2, 4, 4), generator)
    field = functional.interpolate(wave, (2 * SIDE, 2 * SIDE), mode="bicubic", align_corners=True)
    field = field.clamp(-WARP["elastic"], WARP["elastic"])
    ticks = (torch.arange(2 * SIDE) + 0.5) / SIDE - 1
    target = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1) + field.permute(0, 2, 3, 1)
    inverse = torch.linalg.inv(pose * size.view(n, 1, 1))
    source = (target - shift.view(n, 1, 1, 2)).flatten(1, 2) @ inverse.transpose(1, 2)
    ink = functional.grid_sample(prints.unsqueeze(1) / 255, source.view(n, 2 * SIDE, 2 * SIDE, 2), align_corners=False)
    return (functional.avg_pool2d(ink, 2) * WARP["gain"]).clamp(max=1).mul(255).round().to(torch.uint8)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(shape, generator=generator) - 1


def _pose(n: int, generator: torch.Generator) -> Tensor:
    angle, slant, stretch = (WARP[k] * _uniform((n,), generator) for k in ("angle", "slant", "stretch"))
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    zero = torch.zeros(n)
    lean = torch.stack([stretch.exp(), slant, zero, (-stretch).exp()], 1).view(n, 2, 2)
    return turn @ lean


def _half_extent(prints: Tensor) -> Tensor:
    """float `[n, 2]`: how far each glyph's ink reaches right and down from the centre of its square, which is 1."""
    offset = (torch.arange(CANVAS) + 0.5 - CANVAS / 2).abs() + 0.5
    ink = (prints > 0).float()
    return torch.stack([(ink.amax(dim) * offset).amax(1) for dim in (1, 2)], 1) / (CANVAS / 2)


def _build(glyphs: Sequence[Glyph], seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset("glyphs", *(_image_set([g for g in glyphs if g.script in SCRIPTS[s]], generator) for s in SPLITS))


def _image_set(glyphs: Sequence[Glyph], generator: torch.Generator) -> ImageSet:
    images = draw(glyphs, generator)
    return ImageSet(images, torch.full((len(glyphs),), DRAWINGS), tuple(glyph.name for glyph in glyphs))
