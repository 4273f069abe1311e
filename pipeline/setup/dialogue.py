"""`shotless init` on a terminal: it shows the labelled file, and asks what the options did not say, each question with a guess."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import typer

from pipeline.data.examples import shorten
from pipeline.data.readers import MISSING, Row
from pipeline.params import TaskParams
from pipeline.setup.new_task import MOST_LABELS, Answers, columns_of, label_counts, rows_of, word_guesses

ROWS_READ, ROWS_SHOWN = 500, 3


@dataclass(frozen=True)
class Table:
    """The first rows of a file: the texts of each column."""

    columns: Mapping[str, Sequence[str]]

    def guess_text(self) -> str:
        """The column of the longest texts, unless one is called so."""
        return "text" if "text" in self.columns else max(self.columns, key=lambda name: sum(map(len, self.columns[name])))

    def guess_label(self, texts: Sequence[str]) -> str:
        """Of the other columns the one with the fewest different values, unless one is called so."""
        different = {name: len(set(values)) for name, values in self.columns.items() if name not in texts}
        few = [name for name, count in different.items() if 2 <= count <= MOST_LABELS] or list(different)
        return "label" if "label" in self.columns else min(few, key=lambda name: different[name], default="label")


def read_table(answers: Answers) -> Table:
    """The labelled file's first rows. Raises UsageError if it cannot be read."""
    names = columns_of(answers, answers.labelled)
    read = [row.values for row in islice(rows_of(answers, answers.labelled, names), ROWS_READ) if isinstance(row, Row)]
    return Table({name: ["" if values[at] is MISSING else str(values[at]) for values in read] for at, name in enumerate(names)})


def ask(answers: Answers, *, template: bool, label_column: bool) -> Answers:
    """Complete `answers` on the terminal; template and label column are asked for if set. Raises UsageError if one cannot be used."""
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    table = read_table(answers)
    grid = Grid(*map(Text, table.columns), title=Text(str(answers.labelled)))  # Text: a text's brackets are no markup
    for values in islice(zip(*table.columns.values(), strict=True), ROWS_SHOWN):
        grid.add_row(*(Text(shorten(value)) for value in values))
    Console().print(grid)
    if template:
        usual = answers.template.replace("\n", "\\n")
        answers = replace(answers, template=typer.prompt("Prompt ({text} is the input, \\n a new line)", usual).replace("\\n", "\n"))
    columns = dict(answers.fields)
    for name in TaskParams.model_construct(template=answers.template).fields:
        if name not in columns and name not in table.columns:
            columns[name] = typer.prompt(f"Column of {{{name}}}", table.guess_text())
    used = [columns.get(name, name) for name in TaskParams.model_construct(template=answers.template).fields]
    answers = replace(answers, fields=columns)
    if label_column:
        answers = replace(answers, label_column=typer.prompt("Column of the labels", table.guess_label(used)))
    counts = label_counts(answers)
    guesses, words = word_guesses(list(counts)), dict(answers.verbalisers)
    for label, count in counts.items():
        if label not in words:
            words[label] = typer.prompt(f"Label {label!r}, {count:,} rows: the model answers", guesses[label])
    return replace(answers, verbalisers=words)
