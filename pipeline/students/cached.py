"""Learning a teacher's distributions over the vocabulary, at every token of its answers, from the score cache.

The student reads the bare query and the answer that the teacher gave (or, where answers are labels, the query alone), and at each of the
answer's positions its distribution is drawn to the cached one. Prompts differ, so positions are paired by the answer's own tokens: the
answer of a row stands in the cache, and the student is asked in front of each of its tokens, wherever that is in its prompt.

Every (context, example) is a row to learn from. The mean over contexts of KL(teacher in a context ‖ student) has the gradient of the KL to
their mean, so an ensemble of contexts needs no distribution of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.cache.distributions import Distributions, check_retained, decode
from pipeline.cache.folder import read_cache
from pipeline.cache.reader import CacheReader
from pipeline.errors import MismatchError
from pipeline.models.rows import Row, rows_of
from pipeline.params import CacheParams
from pipeline.places import Place
from pipeline.schema import examples, read_table
from pipeline.students.matching import HiddenLesson, states_of
from pipeline.students.objectives.vocabulary import Divergence
from pipeline.task import TaskTokens

POSITIONS_CHECKED = 4096
"""Positions whose retained mass is weighed before training."""


@dataclass(frozen=True)
class CachedRow:
    """One answer of the teacher to learn."""

    example_id: str
    """Of context and example: a row's own."""
    ids: tuple[int, ...]
    """The student's prompt."""
    answer: tuple[int, ...]
    """The answer's tokens; empty where answers are labels, which have the one position behind the prompt."""
    row: int
    """In the cache."""

    @property
    def positions(self) -> int:
        """Distributions that belong to it."""
        return max(1, len(self.answer))

    @property
    def packed(self) -> Row:
        """The prompt, continued by the answer up to its last token."""
        return rows_of([self.ids], [self.answer])[0]


@dataclass(frozen=True)
class CacheTerm:
    """A summand of the objective: weight × mean divergence to cached distributions over the positions of a step."""

    divergence: Divergence
    weight: float
    """0: hidden states alone are learnt."""
    batch_size: int
    examples: tuple[CachedRow, ...]
    source: "CachedTeacher"
    hidden: HiddenLesson | None = None


class CachedTeacher:
    """The distributions of one score cache, as a student of this task and tokenizer may learn them."""

    def __init__(self, folder: Place, work: Path, tokens: TaskTokens, tokenizer_sha256: str, temperature: float) -> None:
        self._reader = CacheReader(folder, work)
        self.manifest = self._reader.manifest
        self.folder, self.temperature = folder, temperature
        self.fingerprint: str = self.manifest["fingerprint_sha256"]
        self.params = CacheParams.model_validate(self.manifest["fingerprint"]["cache"])
        self._check(tokens, tokenizer_sha256)

    def _check(self, tokens: TaskTokens, tokenizer_sha256: str) -> None:
        """Raise MismatchError where the cache is of another task or tokenizer: its token ids would mean something else."""
        found = self.manifest["fingerprint"]
        task = (tokens.task.of_texts() if self.reads_texts else tokens.task).params
        wanted = {
            "tokenizer": tokenizer_sha256,
            "template": task.template,
            "verbalisers": dict(task.verbalisers),
            "completion": task.answering,
        }
        different = [
            f"  {key}: the cache has {found[key]!r}, this student {value!r}" for key, value in wanted.items() if found[key] != value
        ]
        if different:
            raise MismatchError(
                f"{self.folder}: its distributions are over another tokenizer's ids, or belong to another task:\n"
                + "\n".join(different)
                + "\nA student of another family learns from a target set over the labels (`learn_from: targets/NAME`)."
            )

    @property
    def reads_texts(self) -> bool:
        """Whether its rows are the inputs themselves, token by token."""
        return (self.manifest["fingerprint"]["completion"] or {}).get("source") == "text"

    def lessons(self, transfer_file: Path, tokens: TaskTokens) -> tuple[CachedRow, ...]:
        """The rows to learn from, in the cache's order.

        Raises MismatchError where an example is not in the transfer set, UsageError where too little mass is left at the temperature.
        """
        fields = {row["example_id"]: row for row in read_table(transfer_file, examples(tokens.task.fields)).to_pylist()}
        free = set(self.manifest["content_free"])
        keys = read_cache(self.folder, ["context_id", "example_id", "completion_ids"]).rows.to_pylist()
        numbers = [number for number, key in enumerate(keys) if key["example_id"] not in free]
        unknown = next((keys[n]["example_id"] for n in numbers if keys[n]["example_id"] not in fields), None)
        if unknown is not None or not numbers:
            what = "has no rows" if unknown is None else f"example {unknown} is not in {transfer_file}"
            raise MismatchError(f"{self.folder}: {what}; run `dvc repro teacher@{self.folder.name}`.")
        check_retained(self.distributions(numbers[:POSITIONS_CHECKED]), self.params, self.temperature)
        asked = {keys[n]["example_id"]: tokens.task.query(fields[keys[n]["example_id"]]) for n in numbers}
        prompts = dict(zip(asked, tokens.query_ids(list(asked.values())), strict=True))
        if self.reads_texts:
            prompts = {example: ids[:1] for example, ids in prompts.items()}
        prefix = tokens.prefix_ids("")
        return tuple(
            CachedRow(
                f"{key['context_id']}:{key['example_id']}", (*prefix, *prompts[key["example_id"]]), tuple(key["completion_ids"]), number
            )
            for number, key in ((n, keys[n]) for n in numbers)
        )

    def hidden(self, rows: Sequence[int]) -> Tensor:
        """The hidden states at all positions of some rows, [P, kept layers, H] float32."""
        return states_of(self._reader.take(rows)["hidden_states"].to_pylist(), max(1, len(self.params.hidden_layers)))

    def hidden_lesson(self, weight: float, pairs: Sequence[tuple[int, int]], rows: Sequence[CachedRow], where: str) -> HiddenLesson:
        """What is to be matched, scaled by a sample of `rows`."""
        kept, sample = self.params.hidden_layers, [row.row for row in rows[:POSITIONS_CHECKED]]
        return HiddenLesson.of(weight, pairs, kept, self.hidden(sample) if kept else torch.zeros(1, 1, 1), where)

    def distributions(self, rows: Sequence[int]) -> Distributions:
        """The distributions at all positions of some rows, one row's after the other's."""
        return decode(self._reader.take(rows), self.params, self.temperature)
