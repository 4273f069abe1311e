"""A student from Python.

    from pipeline.serving import Predictor
    predictor = Predictor("artifacts/students/cd")
    print(predictor.predict(["A warm and funny film."])[0].label)

The template and the verbalisers come with the student's folder, so no params.yaml is needed. The engine is the one that evaluation uses:
its probabilities are those of `artifacts/predictions`, up to rounding, which depends on the inputs that share a batch. An input that cannot
be used gets a prediction that says why, and the others get their answers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import PreTrainedModel

from pipeline.data.examples import BadValueError, field_text
from pipeline.data.readers import MISSING
from pipeline.errors import CorruptError, UsageError
from pipeline.files import Folders, read_json, sha256_file, sha256_json, write_json
from pipeline.models import folders
from pipeline.models.folders import context_limit, load_model
from pipeline.models.machine import default_device, memory_bytes, use_machine
from pipeline.models.packed import PackedModel
from pipeline.models.trained import Trained, open_trained
from pipeline.params import CacheParams
from pipeline.schema import NO_CONTEXT, Example, Prompt
from pipeline.teachers import engines
from pipeline.teachers.engines import Engine, open_engine, token_budget

Input = str | Mapping[str, Any]
"""A text, if the template has one field, or a value for each field."""
PROBES = ("N/A", "It was what it was.", "Some of it is good, some of it is not, and by the end nobody in the room could say which. " * 2)
"""Texts that engines are compared on: fixed, so that the choice does not depend on the first inputs."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer, or the reason why there is none: then all but `error` is empty."""

    label: str | None = None  # the most probable one
    confidence: float | None = None  # its probability
    probabilities: dict[str, float] | None = None  # of each label; they sum to 1
    error: str | None = None
    ids: tuple[int, ...] = field(default=(), repr=False)  # token ids of the prompt
    state: npt.NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    """The last layer's output at the answer position, [H]; [0] if the predictor does not keep states."""

    def as_json(self) -> dict[str, Any]:
        """The answer as a JSON object: `label`, `confidence` and `probabilities`, or `error`."""
        if self.error is not None:
            return {"error": self.error}
        return {"label": self.label, "confidence": self.confidence, "probabilities": self.probabilities}


class Predictor:
    """A loaded student. It serves one thread at a time.

    `threads` are those of the matrix products, by default one for each core. With `keep_states` predictions have hidden states. A field
    longer than `max_chars` is an error of its row. Raises UsageError if the folder is not a student's or its answers are free text,
    CorruptError if its files are not those of its training.
    """

    def __init__(
        self, student: str | Path | Trained, threads: int | None = None, keep_states: bool = False, max_chars: float = math.inf
    ) -> None:
        self.student = student if isinstance(student, Trained) else open_trained(Path(student))
        self.task = self.student.task
        if self.task.params.completion is not None:
            raise UsageError(
                f"{self.student.folder}: this student answers in free text; predict, serve and monitor are for labels. docs/using.md shows "
                "how plain transformers asks it."
            )
        self.labels = self.task.labels
        files = self.student.manifest["files"]  # whose hashes were just compared
        weights = [name for name in files if name == "config.json" or name.endswith(".safetensors")]
        self.weights_sha256 = sha256_json({name: files[name]["sha256"] for name in weights})
        self._tokens = self.student.tokens
        self._limit = context_limit(self.student.folder)
        self._max_chars = max_chars
        use_machine(threads)
        model = load_model(self.student.folder, device=str(default_device()))
        self.engine = self._open_engine(model, CacheParams(encoding="top_k", top_k=1, hidden_layers=(-1,) if keep_states else ()))
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
        prompts: dict[int, Prompt] = {}
        for place, prompt in zip(examples, self._tokens.prompts(NO_CONTEXT, list(examples.values())), strict=True):
            needed = len(prompt.ids) + self._tokens.longest_answer - 1  # the answer's last token is not read
            if self._limit is not None and needed > self._limit:
                found[place] = Prediction(error=f"too long: {needed:,} tokens with the answer, and the student takes {self._limit:,}")
            else:
                prompts[place] = prompt
        if prompts:
            found |= zip(prompts, self._answers(list(prompts.values())), strict=True)
        return [found[place] for place in range(len(inputs))]

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
        for name, text in example.fields.items():
            if len(text) > self._max_chars:
                raise BadValueError(name, f"longer than {self._max_chars:,} characters", text)
        if fault := self._tokens.fault_of(example):
            raise BadValueError(first, fault, value)
        return example

    def _open_engine(self, model: PreTrainedModel, cache: CacheParams) -> Engine:
        """The engine that was chosen before for this folder, code, libraries and machine, if `.work` remembers it; else it is chosen."""
        code = {file.name: sha256_file(file) for file in (*Path(folders.__file__).parent.glob("*.py"), Path(engines.__file__))}
        machine = [torch.backends.cpu.get_cpu_capability(), str(model.device), torch.__version__, transformers.__version__]
        known = sha256_json([self.student.manifest, cache.model_dump(mode="json"), code, machine])
        note = Folders.here().work / "engines" / f"{known[:32]}.json"
        try:
            answers_only, reason = read_json(note)
        except (OSError, CorruptError, TypeError, ValueError):
            probes = [Example(dict.fromkeys(self.task.fields, text)) for text in PROBES]
            engine = open_engine(model, self._tokens, cache, self._tokens.prompts(NO_CONTEXT, probes))
            with suppress(OSError):  # where nothing can be written, it is chosen each time
                if note.parent.parent.is_dir():
                    write_json([engine.packed and engine.packed.answers_only, engine.reason], note)
            return engine
        packed = None if answers_only is None else PackedModel(model, answers_only=bool(answers_only))
        engine = Engine(model, packed, self._tokens.completions, cache, token_budget(model, memory_bytes(model.device)))
        engine.reason = f"{reason}; found before"
        return engine

    def _answers(self, prompts: Sequence[Prompt]) -> Iterator[Prediction]:
        scores = self.engine.score(prompts)
        shares = scores.label_logprobs.double().softmax(-1).tolist()  # [N, L]
        states = scores.encoded["hidden_states"].float().clamp(-65504, 65504).cpu().numpy()  # [N, H]; kept in float16, which may overflow
        for prompt, row, state in zip(prompts, shares, states, strict=True):
            if not all(map(math.isfinite, row)):
                yield Prediction(error="the student's probabilities are not numbers; train it again")
                continue
            confidence = max(row)
            label = self.labels[row.index(confidence)]
            yield Prediction(label, confidence, dict(zip(self.labels, row, strict=True)), None, prompt.ids, state)
