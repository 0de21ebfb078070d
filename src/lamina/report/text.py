"""A report as plain text for a terminal."""

from __future__ import annotations

import io
import shutil
import sys

from lamina.report.sections import Facts, Section, sections

WIDTH = 110  # at most
SHOWN = 40  # rows of a long table; the rest is in the files
# Plain ASCII: a report must print on every terminal and into every pipe.
RULES = "    \n    \n -- \n    \n    \n -- \n    \n    \n"


def render_text(facts: Facts, width: int | None = None, color: bool | None = None) -> str:
    """Return the report as text.

    Args:
        facts: from `collect`.
        width: of the lines, at most 110; default: the terminal's.
        color: with terminal colours; default: only where standard output is a terminal.
    """
    from rich.console import Console

    if color is None:
        color = bool(getattr(sys.stdout, "isatty", lambda: False)())
    if width is None:
        width = shutil.get_terminal_size((WIDTH, 24)).columns
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=max(40, min(WIDTH, width)),
        force_terminal=color,
        color_system="standard" if color else None,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )
    for section in sections(facts):
        _print(console, section)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _print(console: object, section: Section) -> None:
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    assert isinstance(console, Console)
    console.print(Text(section.title, style="bold"))
    width = len(section.rows[0])
    headed = bool(section.columns)
    table = Table(
        box=Box(RULES, ascii=True) if headed else None,
        show_header=headed,
        show_footer=bool(section.total),
        show_edge=False,
        pad_edge=True,
        header_style="bold",
        footer_style="",
        padding=(0, 1),
    )
    for i in range(width):
        table.add_column(
            Text(section.columns[i] if headed else ""),
            footer=Text(clean(section.total[i]) if section.total else ""),
            justify="right" if i in section.right else "left",
            no_wrap=i in section.right,
            overflow="fold",
        )
    for row in section.rows[:SHOWN]:
        table.add_row(*(Text(clean(cell)) for cell in row))
    console.print(table)
    if len(section.rows) > SHOWN:
        more = len(section.rows) - SHOWN
        console.print(Text(f"  and {more} more, in report.html and report.json"))
    if section.note:
        console.print(Text(f"  {section.note}", style="dim"))
    console.print()


def clean(text: str) -> str:
    """Return text without control characters, which could steer the terminal.

    Example:
        >>> clean("a\\x1b[31mb")
        'a[31mb'
    """
    return "".join(c for c in text if c.isprintable())
