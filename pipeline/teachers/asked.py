"""What a request asks of a model: contexts and inputs, whose token ids are made as they are needed.

All inputs are tokenised a run at a time for their lengths, from which batches are planned; the last runs are kept, and an earlier one is
made again when its rows are scored. Of a million inputs memory so holds 40 bytes each and a block's ids, where lists of ids would take
1.5 kB each. Tokenising twice costs less than a thousandth of what scoring does.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Protocol

import numpy as np

from pipeline.cache.keys import ExampleIds
from pipeline.errors import UsageError
from pipeline.models.rows import Completions
from pipeline.task import TaskTokens

TokenIds = Mapping[str, Sequence[int]]
"""Token ids by context_id."""
RUN = 1024
"""Inputs that are tokenised together: the tokenizer's own account of them is several times their ids."""
RUNS_KEPT = 18
"""A block of the store has 16 runs at most, and begins and ends within one."""


@dataclass(frozen=True)
class Query:
    """One input to be scored."""

    example_id: str
    fields: Mapping[str, str]
    answer: str | None = None
    """Its answer in free text, where answers are given."""


class Given(Protocol):
    """What an engine is given of a request, wherever its token ids come from."""

    @property
    def prefixes(self) -> TokenIds:
        """Contexts by context_id."""
        ...

    def rows(self, examples: Sequence[str]) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of some inputs, and of their answers where these are there."""
        ...

    def spread(self, count: int) -> list[str]:
        """Some inputs, from the shortest to the longest."""
        ...


class Asked:
    """Contexts' token ids, and inputs that are given theirs on demand.

    `queries` may be any sequence that gives slices, also one that reads them from a file; each stands there once. Raises UsageError where a
    given answer is too long, a text to be read is too short, or an input spells a control token and the template has some, ValueError
    where a query stands there twice.
    """

    def __init__(self, tokens: TaskTokens, prefixes: TokenIds, queries: Sequence[Query]) -> None:
        self.prefixes = prefixes
        self._tokens, self._queries = tokens, queries
        self._runs: OrderedDict[int, _Run] = OrderedDict()
        self.examples = ExampleIds(query.example_id for run in self._slices() for query in run)
        if not self.examples.all_different:
            raise ValueError("an example is asked twice")
        runs = range(-(-len(queries) // RUN))
        self.lengths: np.ndarray = np.concatenate([np.zeros(0, np.int32), *(self._run(number).queries.lengths for number in runs)])
        """Tokens of each input, by its place."""
        if tokens.task.reads_texts and len(self.lengths) and self.lengths.min() < 2:
            short = self.examples[int(self.lengths.argmin())]
            raise UsageError(f"example {short[:12]} is one token with its template, and `reads: texts` needs two; leave it out.")

    def lengths_of(self, examples: Sequence[str]) -> list[int]:
        """Tokens of some inputs."""
        return self.lengths[self.examples.find(examples)].tolist()

    def rows(self, examples: Sequence[str]) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of some inputs, and of their answers where these are there: all of a text to be read but its first token is one."""
        queries: list[list[int]] = []
        answers: list[list[int]] = []
        for place in self.examples.find(examples).tolist():
            number, row = divmod(place, RUN)
            run = self._run(number)
            ids = run.queries.row(row)
            texts = self._tokens.task.reads_texts
            queries.append(ids[:1] if texts else ids)
            if texts:
                answers.append(ids[1:])
            elif run.answers is not None:
                answers.append(run.answers.row(row))
        return queries, answers if self._tokens.task.answers_are_given or self._tokens.task.reads_texts else None

    def spread(self, count: int) -> list[str]:
        """Some inputs, evenly spaced from the shortest to the longest."""
        order = np.lexsort((self.examples.order.argsort(), self.lengths))
        return [self.examples[int(order[round(number * (len(order) - 1) / (count - 1))])] for number in range(count)]

    def longest(self) -> int:
        """The place of the longest input, of equal ones the first."""
        return int(self.lengths.argmax())

    def _slices(self) -> Iterator[Sequence[Query]]:
        return (self._queries[start : start + RUN] for start in range(0, len(self._queries), RUN))

    def _run(self, number: int) -> "_Run":
        if number not in self._runs:
            self._runs[number] = self._tokenised(self._queries[number * RUN : (number + 1) * RUN])
            while len(self._runs) > RUNS_KEPT:
                self._runs.popitem(last=False)
        self._runs.move_to_end(number)
        return self._runs[number]

    def _tokenised(self, queries: Sequence[Query]) -> "_Run":
        texts = [self._tokens.task.query(query.fields) for query in queries]
        for query, text in zip(queries, texts, strict=True):
            if fault := self._tokens.fault_of(text):
                raise UsageError(f"example {query.example_id[:12]} {fault}; leave it out, or write the template without them.")
        ids = _Flat(self._tokens.query_ids(texts))
        if not self._tokens.task.answers_are_given:
            return _Run(ids, None)
        return _Run(ids, _Flat(self._tokens.answer_ids([query.answer or "" for query in queries])))


class _Flat:
    """Lists of token ids in 4 bytes a token."""

    def __init__(self, rows: Completions) -> None:
        self._ids = np.fromiter(chain.from_iterable(rows), dtype=np.int32)
        self._ends = [0, *accumulate(map(len, rows))]

    def row(self, number: int) -> list[int]:
        return self._ids[self._ends[number] : self._ends[number + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(np.array(self._ends, dtype=np.int32))


@dataclass(frozen=True)
class _Run:
    queries: _Flat
    answers: _Flat | None
