"""Each table of docs/coming_from.md is two programs, old and new, and they compute the same."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import ImageSet
from peers import import_higher, import_learn2learn, import_torchmeta

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text("utf-8")
IMPORTED = {"learn2learn": import_learn2learn, "torchmeta": import_torchmeta, "higher": import_higher}
TABLES = re.findall(r"^\| (\w+) \| fewshot_asam \|\n\|---\|---\|\n((?:\|.*\|\n)+)", PAGE, re.MULTILINE)
WAYS, IMAGES = 5, 20


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def columns(table: str) -> tuple[str, str]:
    """The two programs; lines below a `with` belong to it."""
    rows = [[cell.strip().strip("`") for cell in row.strip("|").split(" | ")] for row in table.splitlines()]
    programs = []
    for lines in zip(*rows, strict=True):
        at = next((number for number, line in enumerate(lines, 1) if line.startswith("with ")), len(lines))
        programs.append("\n".join(lines[:at]) + "\n" + textwrap.indent("\n".join(lines[at:]), "    "))
    return programs[0], programs[1]


def classes_of(torchmeta: ModuleType) -> Any:
    """torchmeta's 5-way tasks over classes of constant images."""
    data = torchmeta.utils.data
    Parent: Any = data.ClassDataset
    OneParent: Any = data.Dataset

    class OneClass(OneParent):  # type: ignore[misc]
        def __len__(self) -> int:
            return IMAGES

        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            return torch.full((1, 4, 4), float(self.index)), self.target_transform(self.index)

    class Classes(Parent):  # type: ignore[misc]
        num_classes = 8

        def __getitem__(self, index: int) -> OneClass:
            return OneClass(index)

    relabel = torchmeta.transforms.Categorical(WAYS)
    return data.CombinationMetaDataset(Classes(meta_train=True), num_classes_per_task=WAYS, target_transform=relabel)


def given(library: str, module: ModuleType, *, old: bool) -> dict[str, Any]:
    """What the page says that both programs begin with, the same for each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, WAYS))
    images = torch.randint(0, 256, (8 * IMAGES, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(8).repeat_interleave(IMAGES)
    names: dict[str, Any] = {"torch": torch, "F": F, "model": model, "images": images, "labels": labels}
    names |= {"x_s": torch.rand(5, 1, 4, 4), "y_s": torch.arange(5), "x_q": torch.rand(10, 1, 4, 4)}
    names |= {"y_q": torch.arange(10) % 5, "weights": model.state_dict()}
    if library == "torchmeta":
        names |= {"dataset": classes_of(module)} if old else {"images": ImageSet.from_arrays(images, labels)}
    return names


def numbers(value: object) -> list[Any] | None:
    """What can be compared: a tensor, a number, a shape, or a sequence of them."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, bool | int):
        return [torch.tensor(float(value))]
    if isinstance(value, list | tuple) and len(value):
        parts = [numbers(part) for part in value]
        return None if None in parts else [one for part in parts for one in part or []]
    return None


@pytest.mark.parametrize(("library", "table"), TABLES, ids=[f"{name}{n}" for n, (name, _) in enumerate(TABLES)])
def test_both_columns_compute_the_same(library: str, table: str) -> None:
    module = IMPORTED[library]()
    old, new = columns(table)
    found = []
    for program in (old, new):
        names = given(library, module, old=program == old)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if program == old else "error")
            exec(program, names)
        found.append(names)
    assigned = set(re.findall(r"^ *([\w, ]+) = ", old, re.MULTILINE)) & set(
        re.findall(r"^ *([\w, ]+) = ", new, re.MULTILINE)
    )
    compared = []
    for name in sorted({one for names in assigned for one in names.split(", ")}):
        theirs, ours = (numbers(names[name]) for names in found)
        if name in ("x", "y") or theirs is None or ours is None:  # random images, whose shapes are compared
            continue
        compared.append(name)
        assert len(theirs) == len(ours), name
        for one, other in zip(theirs, ours, strict=True):
            assert torch.allclose(one, other, atol=1e-12), name
    assert len(compared) >= 2, compared


def test_every_library_has_its_tables() -> None:
    assert [name for name, _ in TABLES] == ["learn2learn", "learn2learn", "torchmeta", "torchmeta", "higher"]


def test_names_in_a_state_dict() -> None:
    l2l: Any = import_learn2learn()
    assert all(name.startswith("module.") for name in l2l.algorithms.MAML(nn.Linear(2, 2), lr=0.1).state_dict())
