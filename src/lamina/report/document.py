"""The report as a value: facts in, text, Markdown, HTML and JSON out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.errors import RunError
from lamina.run import write_atomic

# What a report needs to be shown: a type, (types), [of items], {name: of value} or (one, None);
# a name "*" stands for all names there are.
NUMBER, MAYBE = (int, float), (int, float, type(None))
TEXT = (str, type(None))
NEEDED: dict[str, Any] = {
    "lamina": str,
    "date": str,
    "seed": int,
    "machine": {"cpu": str, "system": str, "python": str, "torch": str, "threads": int},
    "network": {"name": str, "source": str, "digest": str, "params": NUMBER, "macs": NUMBER,
                "bytes": NUMBER},
    "data": {"name": TEXT, "samples": int, "validation": MAYBE},
    "budget": {"text": str, "limits": dict, "met": dict},
    "size": {"original": NUMBER, "planned": NUMBER, "file": int, "limit": MAYBE, "ratio": NUMBER},
    "ledger": [{"part": str, "site": TEXT, "bytes": int, "form": TEXT, "codec": TEXT}],
    "sites": [{"site": str, "op": str, "shape": list, "chain": str, "params_before": NUMBER,
               "params_after": NUMBER, "macs_before": NUMBER, "macs_after": NUMBER,
               "bytes_before": NUMBER, "bytes_planned": NUMBER, "bytes_file": int,
               "error_predicted": MAYBE, "error_measured": MAYBE}],
    "refusals": [{"where": str, "what": str, "why": str}],
    "quality": {"metric": str, "unit": str,
                "validation": ({"before": MAYBE, "applied": MAYBE, "after": MAYBE, "drop": MAYBE,
                                "applied_drop": MAYBE}, None),
                "test": ({"before": MAYBE, "after": MAYBE, "drop": MAYBE}, None),
                "fidelity": ({"after": {"agreement": MAYBE, "samples": int}}, None)},
    "error": {"predicted": MAYBE, "measured_applied": MAYBE, "measured": MAYBE, "objective": str},
    "latency": ({"before_s": MAYBE, "after_s": MAYBE, "ratio": MAYBE}, None),
    "curve": {"points": list, "planned": list, "final": (list, type(None))},
    "recovery": ({"steps": int, "history": [{"step": NUMBER, "loss": MAYBE}]}, None),
    "stages": [{"name": str}],
    "notes": [str],
}  # fmt: skip
OPTIONAL: dict[str, Any] = {  # what not every report has
    "rounds": [{"round": NUMBER, "why": str, "asked": str, "predicted": {"*": MAYBE},
                "measured": {"*": MAYBE}, "kept": bool, "note": str}],
    "curves": {"*": [{"chain": str, "steps": str, "bits": NUMBER, "params": NUMBER, "macs": NUMBER,
                      "seconds": NUMBER, "error": MAYBE, "taken": bool}]},
    "prices": {"*": MAYBE},
    "seconds": ({"original": NUMBER, "predicted": NUMBER,
                 "sites": {"*": {"before": NUMBER, "after": NUMBER}}}, None),
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Report:
    """What came of a compression.

    Args:
        facts: from `collect`; kept as plain JSON values (no NaN: what is not a number is None).

    Example:
        >>> Report({"notes": [float("nan")]}).dict()
        {'notes': [None]}
    """

    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", plain(self.facts))

    def __repr__(self) -> str:
        size = self.facts.get("size", {})
        return f"Report({size.get('original')} -> {size.get('file')} bytes)"

    def dict(self) -> dict[str, Any]:
        """Return the facts as JSON values; the caller's own copy."""
        copied: dict[str, Any] = plain(self.facts)
        return copied

    def json(self) -> str:
        """Return the facts as strict JSON text."""
        return json.dumps(self.facts, indent=1, allow_nan=False) + "\n"

    def table(self) -> str:
        """Return the report as text, at most 110 columns wide; coloured on a terminal only."""
        from lamina.report.text import render_text

        return render_text(self.facts)

    def markdown(self) -> str:
        """Return the report as a Markdown page."""
        from lamina.report.markdown import render_markdown

        return render_markdown(self.facts)

    def html(self, path: str | Path | None = None) -> str:
        """Return the report as one self-contained HTML page.

        Args:
            path: where to write it, whole or not at all; None: only return it.

        Raises:
            RunError: the file cannot be written.
        """
        from lamina.report.html import render_html

        page = render_html(self.facts)
        if path is not None:
            write_atomic(Path(path), page.encode(errors="replace"))
        return page

    def save(self, folder: str | Path) -> None:
        """Write `report.json`, `report.md` and `report.html` into a folder.

        Raises:
            RunError: a file cannot be written.
        """
        where = Path(folder)
        write_atomic(where / "report.json", self.json().encode())
        write_atomic(where / "report.md", self.markdown().encode(errors="replace"))
        self.html(where / "report.html")


def load_report(path: str | Path) -> Report:
    """Open a report that was saved.

    Args:
        path: a run folder, or a `report.json`.

    Raises:
        RunError: there is none, or it is not a report.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "report.json"
    try:
        facts = plain(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        why = error.strerror or str(error)
        raise RunError("cannot read the report", str(file), why, "give a finished run") from None
    except (ValueError, RecursionError) as error:
        raise RunError("the report is not JSON", str(file), str(error)) from None
    check(facts, NEEDED, str(file))
    check(facts, {name: kind for name, kind in OPTIONAL.items() if name in facts}, str(file))
    return Report(facts)


def check(value: Any, needed: Any, where: str) -> None:
    """Refuse a document that lacks something a report shows.

    Raises:
        RunError: what is wrong, and where in the document.
    """
    if isinstance(needed, tuple) and needed[-1] is None:
        if value is None:
            return
        needed = needed[0]
    kinds: Any = needed
    if isinstance(needed, Mapping):
        kinds = dict
    elif isinstance(needed, list):
        kinds = list
    if not isinstance(value, kinds):
        raise RunError("not a report", where, f"a {type(value).__name__} is not expected here")
    if isinstance(needed, Mapping):
        if "*" in needed:
            needed = dict.fromkeys(value, needed["*"])
        for name, inner in needed.items():
            if name not in value:
                raise RunError("not a report", where, f"it has no {name!r}")
            check(value[name], inner, f"{where}: {name}")
    elif isinstance(needed, list):
        for i, item in enumerate(value):
            check(item, needed[0], f"{where}[{i}]")


def plain(value: Any) -> Any:
    """Return a deep copy as JSON values; NaN and infinities become None, strange things text."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # NumPy and torch scalars
        value = value.item()
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
