"""The report of a run or of a registered model: one HTML file that holds all that it shows.

`subject` finds what is meant, `gather` reads what is recorded of it into the `Facts` of `facts`, and `ask_model` adds
what is cheap to compute with the model. `sections` chooses what is shown of them and says how to read it, `page`
makes the HTML, and `make` does all of it.
"""

from pipelines.report.facts import Facts
from pipelines.report.make import ARTIFACT, Report, make, page
from pipelines.report.sections import sections
from pipelines.report.subject import ReportSubject, SubjectError, find_subject

__all__ = [
    "ARTIFACT",
    "Facts",
    "Report",
    "ReportSubject",
    "SubjectError",
    "find_subject",
    "make",
    "page",
    "sections",
]
