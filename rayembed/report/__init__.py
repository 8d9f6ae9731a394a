"""One page to read about a run. To add a section: read its file in page.py, and give it a place in report.html.j2."""

from rayembed.report.page import build_report

__all__ = ["build_report"]
