"""A report as Markdown (GitHub flavour)."""

from __future__ import annotations

import re

from lamina.report.sections import Facts, Section, sections


def render_markdown(facts: Facts) -> str:
    """Return the report as a Markdown page."""
    blocks = [f"# {escape(facts['network']['name'])}, compressed"]
    for section in sections(facts):
        blocks += [f"## {section.title}", _table(section)]
        if section.note:
            blocks.append(escape(section.note))
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, in a table cell too.

    Example:
        >>> escape("a|b_<c>")
        'a\\\\|b\\\\_&lt;c&gt;'
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)
    # A bare address would become a link.
    return " ".join(re.sub(r"(?i)\b(https?|ftp|www)([:.])", r"\1&#8203;\2", text).split())


def _table(section: Section) -> str:
    width = len(section.rows[0])
    if width == 1 and not section.columns:
        return "\n".join(f"- {escape(row[0])}" for row in section.rows)
    head = section.columns or ("",) * width
    rule = ["---:" if i in section.right else "---" for i in range(width)]
    lines = [head, rule, *section.rows, *([section.total] if section.total else [])]
    cells = [row if row is rule else [escape(cell) for cell in row] for row in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
