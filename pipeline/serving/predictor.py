"""A student from Python, in three lines.

    from pipeline.serving import Predictor
    predictor = Predictor("artifacts/students/cd")
    print(predictor.predict(["A warm and funny film."])[0].label)

It asks through the engine that evaluation used, so its probabilities are those of `artifacts/predictions`. One input that cannot be
used never keeps the others from an answer: its prediction says why. Trade-off: an input's probabilities may differ in the sixth digit
with the inputs that it is batched with, as rounding does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.teachers.batches import token_budget
from pipeline.teachers.choice import EngineChoice, choose_engine
from pipeline.teachers.scores import Reading
from pipeline.targets.calibration import normalised
from pipeline.errors import UsageError
from pipeline.data.fields import MISSING, BadValueError, field_text
from pipeline.models.loading import context_limit, load_model
from pipeline.models.machine import default_device, memory_bytes, use_machine
from pipeline.serving.states import recording
from pipeline.serving.student import open_student

Floats = npt.NDArray[np.float32]
Input = str | Mapping[str, Any]
"""A text, where the template has one field, or a value for each field."""
PROBES = ("N/A", "It was what it was.", "Some of it is good, some of it is not, and by the end nobody in the room could say which. " * 2)
"""Texts that the engines are compared on: fixed, so that the choice between them does not hang on the first inputs."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer, or why there is none."""

    label: str | None
    """The most probable label; None where there is an error."""
    confidence: float | None
    """Its probability."""
    probabilities: dict[str, float] | None
    """Over all labels, in the student's order; they sum to 1."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """Predictions with what a monitor looks at besides; rows with an error have no ids and no state."""

    predictions: list[Prediction]
    ids: list[list[int]]
    """Token ids of each prompt."""
    states: Floats | None
    """The last layer at the answer position [N, H], where it was asked for; NaN for rows with an error."""


class Predictor:
    """A loaded student. Not for several threads at once: `pipeline.serving.server` gives it one of its own.

    `threads` of the matrix products; by default, the cores there are. Raises UsageError where `folder` is no student's folder.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self.student = open_student(Path(folder))
        self.task = self.student.task
        self.labels = self.task.labels
        self._limit = context_limit(self.student.folder)
        self.threads = use_machine(threads)
        self._prefix = self.student.tokens.prefix_ids("")
        device = default_device()
        self._model = load_model(self.student.folder, device=device)
        budget = token_budget(self._model, memory_bytes(device))
        probes = self.student.tokens.query_ids([self.task.query(dict.fromkeys(self.task.fields, text)) for text in PROBES])
        self._choice = choose_engine(self._model, Reading(self.student.tokens.completions), budget, self._prefix, probes)

    @property
    def engine(self) -> EngineChoice:
        """The engine that answers, and why it was chosen."""
        return self._choice

    def predict(self, inputs: Sequence[Input]) -> list[Prediction]:
        """A prediction for each input, in order. Raises UsageError only where `inputs` is no list; bad inputs come back with an error."""
        return self.answer(inputs).predictions

    def answer(self, inputs: Sequence[Input], with_states: bool = False) -> Answers:
        """Predictions with each prompt's token ids and, where asked for, its last hidden state."""
        if isinstance(inputs, (str, Mapping)):
            raise UsageError("predict takes a list of inputs; for one input write predict([input])[0].")
        errors: dict[int, str] = {}
        queries: dict[int, str] = {}
        for place, value in enumerate(inputs):
            try:
                queries[place] = self.task.query(self._fields(value))
            except BadValueError as bad:
                errors[place] = _sentence(bad)
        ids: dict[int, list[int]] = {}
        for place, query in zip(queries, self.student.tokens.query_ids(list(queries.values())), strict=True):
            if fault := self.student.tokens.fault_of(queries[place]) or self._fault_of_length(len(query)):
                errors[place] = fault
            else:
                ids[place] = query
        return self._score(len(inputs), ids, errors, with_states)

    def fault_of(self, value: Input) -> str | None:
        """Why an input's fields cannot be used, without asking the model; None where they can. Its length is not looked at."""
        try:
            self._fields(value)
        except BadValueError as bad:
            return _sentence(bad)
        return None

    def _score(self, count: int, ids: dict[int, list[int]], errors: Mapping[int, str], with_states: bool) -> Answers:
        """Answers to `count` inputs, of which those in `ids` are asked, in rising order of length."""
        order = sorted(ids, key=lambda place: (len(ids[place]), place))
        predictions = [Prediction(None, None, None, errors.get(place)) for place in range(count)]
        prompts = [[*self._prefix, *ids[place]] if place in ids else [] for place in range(count)]
        states: Floats | None = None
        if with_states:
            states = np.full((count, self._model.config.get_text_config().hidden_size), np.nan, dtype=np.float32)
        if not order:
            return Answers(predictions, prompts, states)
        engine, queries = self._choice.engine, [ids[place] for place in order]
        if states is None:
            scores = engine.score(self._prefix, queries)
        else:
            with recording(self._model, engine, self.student.tokens.completions) as recorded:
                scores = engine.score(self._prefix, queries)
            states[np.array(order)] = recorded.take(len(order)).cpu().numpy()
        values = np.exp(normalised(scores.label_logprobs.cpu().numpy().astype(np.float64)))
        for place, row in zip(order, values, strict=True):
            best = int(row.argmax())
            predictions[place] = Prediction(self.labels[best], float(row[best]), dict(zip(self.labels, map(float, row), strict=True)))
        return Answers(predictions, prompts, states)

    def _fields(self, value: Input) -> dict[str, str]:
        """An input's fields as the student was trained to see them."""
        names = self.task.fields
        first = names[0]
        if isinstance(value, str):
            if len(names) > 1:
                raise BadValueError(first, f"not an object with the fields {', '.join(names)}", value)
            value = {first: value}
        if not isinstance(value, Mapping):
            raise BadValueError(first, "neither a text nor an object", value)
        return {name: field_text(name, value.get(name, MISSING), None) for name in names}

    def _fault_of_length(self, length: int) -> str | None:
        """Why a query of so many tokens does not fit the model; None where it does."""
        branch = max(len(ids) for ids in self.student.tokens.completions) - 1
        needed = len(self._prefix) + length + branch
        if self._limit is None or needed <= self._limit:
            return None
        return f"too long: {needed:,} tokens with the answer, and the student takes {self._limit:,}"


def _sentence(bad: BadValueError) -> str:
    return f"{bad.field_name}: {bad.reason}"
