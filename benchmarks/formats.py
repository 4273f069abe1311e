"""Plain text or chat turns: right answers of one model in both, zero-shot and behind demonstrations.

    python -m benchmarks.formats MODEL FILE --template "Review: {text}\nSentiment:" --demonstrations 16 --texts 150

FILE has rows of `text` and `label`. One draw, by hash: as many demonstrations of each label as fit, and the texts that follow.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.files import sha256_text
from pipeline.params import TaskParams
from pipeline.schema import Context, Example
from pipeline.setup.format_choice import right_answers


def main(
    model: Path,
    file: Path,
    template: Annotated[str, typer.Option()] = r"Text: {text}\nLabel:",
    demonstrations: Annotated[int, typer.Option()] = 16,
    texts: Annotated[int, typer.Option()] = 150,
    threads: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Print right answers as they are, and after the default calibration."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: sha256_text(row["text"]))
    labels = sorted({row["label"] for row in rows})
    task = TaskParams(template=template.replace("\\n", "\n"), verbalisers={label: f" {label}" for label in labels})
    shown = [row for label in labels for row in [row for row in rows if row["label"] == label][: demonstrations // len(labels)]]
    shown.sort(key=lambda row: sha256_text(f"shown {row['text']}"))
    asked = [Example({"text": row["text"]}, row["label"]) for row in [row for row in rows if row not in shown][:texts]]
    few_shot = Context("few", "", tuple(({"text": row["text"]}, row["label"]) for row in shown))
    for name, context in (("zero-shot", Context("zero")), (f"{len(shown)} demonstrations", few_shot)):
        for form, counts in right_answers(model, task, context, asked, threads).items():
            raw, calibrated = (f"{count / len(asked):.3f}" for count in counts)
            print(f"{name}, {form}: {raw} as they are, {calibrated} calibrated, {len(asked)} texts", flush=True)


if __name__ == "__main__":
    typer.run(main)
