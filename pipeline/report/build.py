"""`report`: one page, the same numbers as JSON, and a card for each student, from what the other stages left on disk."""

import json
from pathlib import Path

from pipeline.files import replacing
from pipeline.params import Params
from pipeline.report.answers import answers_document, render_answers_page
from pipeline.report.card import render_card
from pipeline.report.collect import collect
from pipeline.report.document import metrics_document
from pipeline.report.page import render_page


def build_report(params: Params, root: Path) -> None:
    """Write `report/index.html`, `report/metrics.json` and each student's card under the project's folder `root`.

    The card is `README.md` in the student's own folder, where there is one; students that answer in free text have none.
    The same inputs give the same bytes. Raises UsageError where predictions are missing, CorruptError where a file cannot be read.
    """
    inputs = collect(params, root)
    free = params.task.completion is not None
    document = answers_document(inputs) if free else metrics_document(inputs)
    page = render_answers_page(document, inputs) if free else render_page(document, inputs)
    folder = root / "report"
    _write(page, folder / "index.html")
    _write(json.dumps(document, indent=1, ensure_ascii=False) + "\n", folder / "metrics.json")
    for name in () if free else params.students:  # a card's numbers are those of labels
        student = root / "artifacts" / "students" / name
        if student.is_dir():
            _write(render_card(document, inputs, name), student / "README.md")


def _write(text: str, file: Path) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
