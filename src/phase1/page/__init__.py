"""Reports -> one HTML page that opens anywhere: no script, nothing fetched, plots and data inside."""

from phase1.page.document import page
from phase1.page.training import Training, trainings_in

NAME = "report.html"

__all__ = ["NAME", "Training", "page", "trainings_in"]
