"""Reports -> one HTML page that opens anywhere: no script, nothing fetched, plots and data inside."""

from phase1.page.document import page

NAME = "report.html"

__all__ = ["NAME", "page"]
