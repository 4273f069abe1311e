"""A student from Python.

    from pipeline.serving import Predictor
    predictor = Predictor("artifacts/students/cd")
    print(predictor.predict(["A warm and funny film."])[0].label)

The template and the verbalisers come with the student's folder, so no params.yaml is needed. The engine is the one that evaluation uses:
its probabilities are those of `artifacts/predictions`, up to rounding, which depends on the inputs that share a batch. A folder that
`shotless export --format onnx` wrote answers by ONNX Runtime, and neither torch nor transformers is imported. An input that cannot be used
gets a prediction that says why, and the others get their answers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.data.examples import BadValueError, field_text
from pipeline.data.readers import MISSING
from pipeline.errors import UsageError
from pipeline.files import sha256_json
from pipeline.models.trained import Trained, open_trained
from pipeline.schema import NO_CONTEXT, Example, Prompt
from pipeline.task import TooLongError

if TYPE_CHECKING:
    from pipeline.models.held_back import Threshold

Input = str | Mapping[str, Any]
"""A text, if the template has one field, or a value for each field."""
ONNX_FILE = "model.onnx"
WEIGHTS = (".safetensors", ".onnx", ".onnx.data")
LabelScores = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Log-probabilities of the labels, [N, L] nats, and the last layer's output at the answer position, [N, H], or [N, 0] if it is not kept."""


class LabelEngine(Protocol):
    """What scores prompts."""

    name: str
    reason: str  # why it was chosen

    def score(self, prompts: Sequence[Prompt]) -> LabelScores:
        """Scores of the prompts, in order."""
        ...


def is_exported(folder: Path) -> bool:
    """Whether a folder is what `shotless export --format onnx` wrote."""
    return (folder / ONNX_FILE).is_file()


def open_folder(folder: Path) -> Trained:
    """A student's folder, or what was exported from one, checked. Raises as `open_trained` does."""
    if not is_exported(folder):
        return open_trained(folder)
    from pipeline.serving.onnx_engine import exported_tokens

    return open_trained(folder, exported_tokens)


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer, or the reason why there is none: then all but `error` is empty."""

    label: str | None = None  # the most probable one
    confidence: float | None = None  # its probability
    probabilities: dict[str, float] | None = None  # of each label; they sum to 1
    error: str | None = None
    cut: bool = False  # the text is longer than the student takes: it was cut, or read in windows, as `task.long_texts` says
    answered: bool = True  # not if a threshold is set, and this is under it or too strange: then ask somebody else
    has_threshold: bool = field(default=False, repr=False)
    by: str | None = None  # who gave it, if there is a fallback: the student, or a target set
    student_answer: "Prediction | None" = None  # what the student said, if the answer is a target set's
    ids: tuple[int, ...] = field(default=(), repr=False)  # token ids of the prompt; of its windows, one after the other
    state: npt.NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    """The last layer's output at the answer position, [H], the mean of the windows'; [0] if the predictor does not keep states."""

    def as_json(self) -> dict[str, Any]:
        """The answer as a JSON object: `label`, `confidence`, `probabilities`, `cut` if it was, `answered` with a threshold, `by` with a
        fallback, and `student_answer` if that answered; or `error`.
        """
        if self.error is not None:
            return {"error": self.error}
        answer = {"label": self.label, "confidence": self.confidence, "probabilities": self.probabilities}
        answer |= ({"cut": True} if self.cut else {}) | ({"answered": self.answered} if self.has_threshold else {})
        own = {} if self.student_answer is None else {"student_answer": self.student_answer.as_json()}
        return answer | ({} if self.by is None else {"by": self.by}) | own


class Predictor:
    """A loaded student. It serves one thread at a time.

    `threads` are those of the matrix products, by default one for each core. With `keep_states` predictions have hidden states. A field
    longer than `max_chars` is an error of its row. With `agree`, what it would not answer as its teacher in that share of cases, with 95 %
    confidence, is marked as not `answered`. Raises UsageError if the folder is not a student's, its answers are free text or its held-back
    texts do not show such an agreement, CorruptError if its files are not those of its training.
    """

    def __init__(
        self,
        student: str | Path | Trained,
        threads: int | None = None,
        keep_states: bool = False,
        max_chars: float = math.inf,
        agree: float | None = None,
    ) -> None:
        self.student = student if isinstance(student, Trained) else open_folder(Path(student))
        self.task = self.student.task
        if self.task.params.completion is not None:
            raise UsageError(
                f"{self.student.folder}: this student answers in free text; predict, serve and monitor are for labels. docs/using.md shows "
                "how plain transformers asks it."
            )
        self.labels = self.task.labels
        files = self.student.manifest["files"]  # whose hashes were just compared
        weights = [name for name in files if name == "config.json" or name.endswith(WEIGHTS)]
        self.weights_sha256 = sha256_json({name: files[name]["sha256"] for name in weights})
        self._tokens = self.student.tokens
        self._max_chars = max_chars
        self.threshold: Threshold | None = None
        """What an answer must reach, if it must."""
        if agree is not None:
            from pipeline.models.held_back import agreeing  # brings scipy, which plain answers do without

            self.threshold = agreeing(self.student, agree)
            keep_states = keep_states or self.threshold.novelty is not None
        self.engine = _open_engine(self.student, threads, keep_states)
        """What answers; its `reason` says why it was chosen."""

    def predict(self, inputs: Sequence[Input]) -> list[Prediction]:
        """A prediction for each input, in order. Raises UsageError only if `inputs` is not a list."""
        if isinstance(inputs, (str, Mapping)):
            raise UsageError("predict takes a list of inputs. For one input write predict([input])[0].")
        found: dict[int, Prediction] = {}  # by the input's place
        examples: dict[int, Example] = {}
        for place, value in enumerate(inputs):
            try:
                examples[place] = self.example(value)
            except BadValueError as bad:
                found[place] = Prediction(error=f"{bad.field_name}: {bad.reason}")
        prompts = dict[int, list[Prompt]]()
        try:
            prompts |= zip(examples, self._windows(list(examples.values())), strict=True)
        except TooLongError:  # one after the other, to see which
            for place, example in examples.items():
                try:
                    prompts |= zip([place], self._windows([example]), strict=True)
                except TooLongError as error:
                    found[place] = Prediction(error=f"too long: {error.reason}")
        if prompts:
            found |= zip(prompts, self._answers(list(prompts.values())), strict=True)
        return [found[place] for place in range(len(inputs))]

    def _windows(self, examples: Sequence[Example]) -> list[list[Prompt]]:
        """The prompts of each example: one, or one for each window."""
        windows = self._tokens.windows(NO_CONTEXT, examples)
        prompts = iter(self._tokens.prompts(NO_CONTEXT, [window for own in windows for window in own]))
        read = [(own != [example], list(islice(prompts, len(own)))) for example, own in zip(examples, windows, strict=True)]
        return [[replace(prompt, cut=True) for prompt in own] if is_cut else own for is_cut, own in read]

    def example(self, value: Input) -> Example:
        """An input's fields, as the student was trained to see them. Raises BadValueError if they cannot be used; length is not checked."""
        first, *others = self.task.fields
        if isinstance(value, str):
            if others:
                raise BadValueError(first, f"not an object with the fields {', '.join(self.task.fields)}", value)
            value = {first: value}
        if not isinstance(value, Mapping):
            raise BadValueError(first, "neither a text nor an object", value)
        example = Example({name: field_text(name, value.get(name, MISSING)) for name in self.task.fields})
        for name, text in example.fields.items():
            if len(text) > self._max_chars:
                raise BadValueError(name, f"longer than {self._max_chars:,} characters", text)
        if fault := self._tokens.fault_of(example):
            raise BadValueError(first, fault, value)
        return example

    def _answers(self, prompts: Sequence[Sequence[Prompt]]) -> Iterator[Prediction]:
        """A prediction for each input, from the mean probabilities of its prompts."""
        logprobs, states = self.engine.score([prompt for own in prompts for prompt in own])
        sizes = np.array([[len(own)] for own in prompts])
        starts = sizes.cumsum() - sizes[:, 0]  # of each input's windows
        with np.errstate(invalid="ignore"):  # what is not a number is found below
            shares = np.exp(logprobs.astype(np.float64) - logprobs.max(-1, keepdims=True))  # [windows, L]
            shares = np.add.reduceat(shares / shares.sum(-1, keepdims=True), starts) / sizes  # [N, L]
            shares = shares ** (1 / self.student.temperature)
            shares /= shares.sum(-1, keepdims=True)
        states, answered = np.add.reduceat(states, starts) / sizes.astype(np.float32), np.ones(len(prompts), dtype=bool)
        if self.threshold is not None:
            answered = self.threshold.answers(shares.max(-1), states)
        for own, row, state, sure in zip(prompts, shares.tolist(), states, answered.tolist(), strict=True):
            if not all(map(math.isfinite, row)):
                yield Prediction(error="the student's probabilities are not numbers; train it again")
                continue
            yield Prediction(
                self.labels[row.index(max(row))],
                max(row),
                dict(zip(self.labels, row, strict=True)),
                cut=own[0].cut,
                answered=sure,
                has_threshold=self.threshold is not None,
                ids=tuple(token for prompt in own for token in prompt.ids),
                state=state,
            )


def _open_engine(student: Trained, threads: int | None, keep_states: bool) -> LabelEngine:
    if not is_exported(student.folder):
        from pipeline.serving.torch_engine import TorchEngine

        return TorchEngine(student, threads, keep_states)
    if keep_states:
        raise UsageError(f"{student.folder}: an exported student keeps no hidden states, which `monitor` compares. Give its own folder.")
    from pipeline.serving.onnx_engine import OnnxEngine

    return OnnxEngine(student, threads)
