"""A student's answers by torch, with the engine that evaluation uses."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from pipeline.errors import CorruptError
from pipeline.files import Folders, read_json, sha256_file, sha256_json, write_json
from pipeline.models import folders
from pipeline.models.folders import load_model
from pipeline.models.machine import default_device, memory_bytes, use_machine
from pipeline.models.packed import PackedModel, tree_of
from pipeline.models.trained import Trained
from pipeline.params import CacheParams
from pipeline.schema import NO_CONTEXT, Example, Prompt
from pipeline.serving.predictor import LabelScores
from pipeline.task import TooLongError
from pipeline.teachers import engines
from pipeline.teachers.engines import Engine, open_engine, token_budget

PROBES = ("N/A", "It was what it was.", "Some of it is good, some of it is not, and by the end nobody in the room could say which. " * 2)
"""Texts that engines are compared on: fixed, so that the choice does not depend on the first inputs."""


class TorchEngine:
    """The model of a student's folder; with `keep_states` its scores have hidden states."""

    def __init__(self, student: Trained, threads: int | None, keep_states: bool) -> None:
        self._student, self._tokens = student, student.tokens
        use_machine(threads)
        model = load_model(student.folder, device=str(default_device()))
        self._engine = self._open(model, CacheParams(encoding="top_k", top_k=1, hidden_layers=(-1,) if keep_states else ()))
        self.name, self.reason = self._engine.name, self._engine.reason

    def score(self, prompts: Sequence[Prompt]) -> LabelScores:
        """Scores of the prompts, in order."""
        scores = self._engine.score(prompts)
        states = scores.encoded["hidden_states"].float().clamp(-65504, 65504)  # kept in float16, which may overflow
        return scores.label_logprobs.cpu().numpy(), states.cpu().numpy()

    def _open(self, model: PreTrainedModel, cache: CacheParams) -> Engine:
        """The engine that was chosen before for this folder, code, libraries and machine, if `.work` remembers it; else it is chosen."""
        code = {file.name: sha256_file(file) for file in (*Path(folders.__file__).parent.glob("*.py"), Path(engines.__file__))}
        machine = [torch.backends.cpu.get_cpu_capability(), str(model.device), torch.__version__, transformers.__version__]
        known = sha256_json([self._student.manifest, cache.model_dump(mode="json"), code, machine])
        note = Folders.here().work / "engines" / f"{known[:32]}.json"
        try:
            answers_only, reason = read_json(note)
        except (OSError, CorruptError, TypeError, ValueError):
            prompts = list[Prompt]()
            for text in PROBES:
                with suppress(TooLongError):  # `task.long_texts: refuse`, and a limit of a few dozen tokens
                    prompts += self._tokens.prompts(NO_CONTEXT, [Example(dict.fromkeys(self._student.task.fields, text))])
            engine = open_engine(model, self._tokens, cache, prompts)
            with suppress(OSError):  # where nothing can be written, it is chosen each time
                if note.parent.parent.is_dir():
                    write_json([engine.packed and engine.packed.answers_only, engine.reason], note)
            return engine
        packed = None if answers_only is None else PackedModel(model, answers_only=bool(answers_only))
        labels = self._tokens.completions
        engine = Engine(model, packed, labels, cache, token_budget(model, memory_bytes(model.device), len(tree_of(labels).tokens)))
        engine.reason = f"{reason}; found before"
        return engine
