"""Reports: what was asked, what came of it, and where every byte went."""

from lamina.report.collect import collect
from lamina.report.document import Report, load_report

__all__ = ["Report", "collect", "load_report"]
