"""`shotless init` on a terminal: it shows the labelled file, and asks what the options did not say, each question with a guess."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

import typer

from pipeline.data.examples import shorten
from pipeline.data.readers import MISSING, Row
from pipeline.params import TaskParams
from pipeline.setup.new_task import MOST_LABELS, ROWS_SHOWN, Answers, columns_of, label_counts, rows_of, word_guesses

ROWS_READ = 500


def read_columns(answers: Answers) -> dict[str, list[str]]:
    """The columns of the labelled file's first rows, as texts. Raises UsageError if it cannot be read."""
    names = columns_of(answers, answers.labelled)
    read = [row.values for row in islice(rows_of(answers, answers.labelled, names), ROWS_READ) if isinstance(row, Row)]
    return {name: ["" if values[at] is MISSING else str(values[at]) for values in read] for at, name in enumerate(names)}


def guess_text(columns: Mapping[str, Sequence[str]]) -> str:
    """The column of the longest texts, unless one is called so."""
    return "text" if "text" in columns else max(columns, key=lambda name: sum(map(len, columns[name])))


def guess_label(columns: Mapping[str, Sequence[str]], texts: Sequence[str]) -> str:
    """Of the columns that are not `texts` the one with the fewest different values, unless one is called so."""
    different = {name: len(set(values)) for name, values in columns.items() if name not in texts}
    few = [name for name, count in different.items() if 2 <= count <= MOST_LABELS] or list(different)
    return "label" if "label" in columns else min(few, key=lambda name: different[name], default="label")


def ask(answers: Answers, *, template: bool, label_column: bool) -> Answers:
    """Complete `answers` on the terminal; template and label column are asked for if set. Raises UsageError if one cannot be used."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns, fields = read_columns(answers), dict(answers.fields)
    table = Table(*columns, title=Text(str(answers.labelled)))
    for values in islice(zip(*columns.values(), strict=True), ROWS_SHOWN):
        table.add_row(*(Text(shorten(value)) for value in values))  # Text: a text's brackets are no markup
    Console().print(table)
    if template:
        usual = answers.template.replace("\n", "\\n")
        answers = replace(answers, template=typer.prompt("Prompt ({text} is the input, \\n a new line)", usual).replace("\\n", "\n"))
    for name in TaskParams.model_construct(template=answers.template).fields:
        if name not in fields:
            fields[name] = name if name in columns else typer.prompt(f"Column of {{{name}}}", guess_text(columns))
    if label_column:
        answers = replace(answers, label_column=typer.prompt("Column of the labels", guess_label(columns, list(fields.values()))))
    counts, words = label_counts(answers), dict(answers.verbalisers)
    for label, guess in word_guesses(counts).items():
        if label not in words:
            words[label] = typer.prompt(f"Label {label!r}, {counts[label]:,} rows: the model answers", guess)
    return replace(answers, verbalisers=words, fields={name: column for name, column in fields.items() if name != column})
