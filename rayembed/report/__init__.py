"""Pages to read about a run: report.html for all of it, audit.html for what was mined.

To add a section to the report: read its file in page.py, and give it a place in report.html.j2.
"""

from rayembed.report.audit import audit_page
from rayembed.report.page import build_report

__all__ = ["audit_page", "build_report"]
