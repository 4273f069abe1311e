"""A student from Python.

    from pipeline.serving import Predictor
    predictor = Predictor("artifacts/students/cd")
    print(predictor.predict(["A warm and funny film."])[0].label)

The template and the verbalisers come with the student's folder, so no params.yaml is needed. The engine is the one that evaluation uses:
its probabilities are those of `artifacts/predictions`, up to rounding, which depends on the inputs that share a batch. An input that cannot
be used gets a prediction that says why, and the others get their answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from pipeline.data.examples import BadValueError, field_text
from pipeline.data.readers import MISSING
from pipeline.errors import UsageError
from pipeline.models.folders import context_limit, load_model, weights_sha256
from pipeline.models.machine import default_device, use_machine
from pipeline.models.trained import Trained, open_trained
from pipeline.params import CacheParams
from pipeline.schema import NO_CONTEXT, Example, Prompt
from pipeline.teachers.engines import open_engine

Floats = npt.NDArray[np.float32]
Input = str | Mapping[str, Any]
"""A text, if the template has one field, or a value for each field."""
PROBES = ("N/A", "It was what it was.", "Some of it is good, some of it is not, and by the end nobody in the room could say which. " * 2)
"""Texts that engines are compared on. They are fixed, so the choice does not depend on the first inputs."""
LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer, or the reason why there is none: then all but `error` is None."""

    label: str | None = None
    """The most probable label."""
    confidence: float | None = None
    """Its probability."""
    probabilities: dict[str, float] | None = None
    """Of each label; they sum to 1."""
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The answer as a JSON object: `label`, `confidence` and `probabilities`, or `error`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Answers:
    """Predictions of N inputs with what the monitor tests besides. Rows with an error have no ids, and states of NaN."""

    predictions: list[Prediction]
    ids: list[tuple[int, ...]]
    """Token ids of each prompt."""
    states: Floats
    """The last layer's output at the answer position [N, H]; [N, 0] if the predictor does not keep it."""


class Predictor:
    """A loaded student. It serves one thread at a time.

    `threads` are those of the matrix products, by default one for each core. `keep_states` makes `answer` return hidden states. Raises
    UsageError if the folder is not a student's or its answers are free text, CorruptError if its files are not those of its training.
    """

    def __init__(self, student: str | Path | Trained, threads: int | None = None, keep_states: bool = False) -> None:
        self.student = student if isinstance(student, Trained) else open_trained(Path(student))
        self.task = self.student.task
        if self.task.params.completion is not None:
            raise UsageError(
                f"{self.student.folder}: this student answers in free text; predict, serve and monitor are for labels. docs/using.md shows "
                "how plain transformers asks it."
            )
        self.labels = self.task.labels
        self.weights_sha256 = weights_sha256(self.student.folder)
        self._tokens = self.student.tokens
        self._limit = context_limit(self.student.folder)
        use_machine(threads)
        model = load_model(self.student.folder, device=str(default_device()))
        self._width = model.config.get_text_config().hidden_size if keep_states else 0
        cache = CacheParams(encoding="top_k", top_k=1, hidden_layers=(-1,) if keep_states else ())
        probes = [Example(dict.fromkeys(self.task.fields, text)) for text in PROBES]
        self.engine = open_engine(model, self._tokens, cache, self._tokens.prompts(NO_CONTEXT, probes))
        """What answers; its `reason` says why it was chosen."""

    def predict(self, inputs: Sequence[Input]) -> list[Prediction]:
        """A prediction for each input, in order. Raises UsageError only if `inputs` is not a list."""
        return self.answer(inputs).predictions

    def answer(self, inputs: Sequence[Input]) -> Answers:
        """Predictions with each prompt's token ids and, with `keep_states`, its last hidden state."""
        if isinstance(inputs, (str, Mapping)):
            raise UsageError("predict takes a list of inputs. For one input write predict([input])[0].")
        predictions = [Prediction()] * len(inputs)
        usable: dict[int, Example] = {}
        for place, value in enumerate(inputs):
            try:
                usable[place] = self.example(value)
            except BadValueError as bad:
                predictions[place] = Prediction(error=f"{bad.field_name}: {bad.reason}")
        ids: list[tuple[int, ...]] = [()] * len(inputs)
        prompts: dict[int, Prompt] = {}
        for place, prompt in zip(usable, self._tokens.prompts(NO_CONTEXT, list(usable.values())), strict=True):
            needed = len(prompt.ids) + self._tokens.longest_answer - 1  # the answer's last token is not read
            if self._limit is not None and needed > self._limit:
                fault = f"too long: {needed:,} tokens with the answer, and the student takes {self._limit:,}"
                predictions[place] = Prediction(error=fault)
            else:
                prompts[place], ids[place] = prompt, prompt.ids
        states = np.full((len(inputs), self._width), np.nan, dtype=np.float32)
        if prompts:
            self._score(prompts, predictions, states)
        return Answers(predictions, ids, states)

    def example(self, value: Input) -> Example:
        """An input's fields, as the student was trained to see them. Raises BadValueError if they cannot be used; length is not checked."""
        first, *others = self.task.fields
        if isinstance(value, str):
            if others:
                raise BadValueError(first, f"not an object with the fields {', '.join(self.task.fields)}", value)
            value = {first: value}
        if not isinstance(value, Mapping):
            raise BadValueError(first, "neither a text nor an object", value)
        example = Example({name: field_text(name, value.get(name, MISSING), None) for name in self.task.fields})
        if fault := self._tokens.fault_of(example):
            raise BadValueError(first, fault, value)
        return example

    def _score(self, prompts: Mapping[int, Prompt], predictions: list[Prediction], states: Floats) -> None:
        """Fill in the predictions and states of `prompts`, each at its place."""
        scores = self.engine.score(list(prompts.values()))
        probabilities = softmax(scores.label_logprobs.double().cpu().numpy(), axis=-1)  # [N, L]
        for place, row in zip(prompts, probabilities, strict=True):
            if np.isfinite(row).all():
                best = int(row.argmax())
                predictions[place] = Prediction(self.labels[best], float(row[best]), dict(zip(self.labels, row.tolist(), strict=True)))
            else:
                predictions[place] = Prediction(error="the student's probabilities are not numbers; train it again")
        if self._width:  # kept in float16, which may overflow
            kept = scores.encoded.hidden_states.float().clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)
            states[list(prompts)] = kept.cpu().numpy()
