"""One section of a report: a titled table whose every cell is text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A titled table; every cell is text.

    Args:
        name: a short name, for links and tests.
        title: of the section.
        columns: header cells; empty where the rows need none.
        right: the columns (by index) that hold numbers.
        rows: the cells.
        total: a last row that sums up, or empty.
        note: a sentence under the table.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    right: frozenset[int]
    rows: tuple[tuple[str, ...], ...]
    total: tuple[str, ...] = ()
    note: str = ""


def own_rows(facts: Facts) -> list[Mapping[str, Any]]:
    """Return the rows of layers and spans that can be summed up: without the layers of spans."""
    return [site for site in facts["sites"] if "span" not in site]
