"""What a student does not answer goes to a target set's teachers, and their one answer comes back in its place.

Scores go through the store, kept as the teachers' own stage keeps them: a text is asked once, and if it is in a later transfer set (see
`data.sources.X.where`), its rows are there.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.errors import ShotlessError, UsageError
from pipeline.evaluation.predictions import read_calibration, teachers_of
from pipeline.files import Folders
from pipeline.params import CacheParams, Params, pick
from pipeline.schema import Example
from pipeline.serving.predictor import Input, Prediction, Predictor
from pipeline.targets.calibration import combination_of
from pipeline.task import Task


class Fallback:
    """A target set that answers for a student; one thread at a time. Teachers are loaded when they are first needed.

    Beyond `most` texts nothing more is handed back. Raises UsageError if params.yaml or the run has no such target set, MismatchError if
    its teachers are no longer what they were, or the student is of another task.
    """

    def __init__(self, name: str, predictor: Predictor, params: Params, folders: Folders, most: float = math.inf) -> None:
        pick("targets", params.targets, name)
        predictor.student.check_task(params.task)
        if not (file := folders.artifacts / "targets" / name / "calibration.json").is_file():
            raise UsageError(f"--fallback {name}: no {file}. Run `dvc repro targets@{name}`.")
        self.name = name
        self.counts = {"answered": 0, "over the limit": 0, "failed": 0}
        """Texts that the student did not answer, by what became of them."""
        self._predictor, self._left = predictor, most
        self._combination = combination_of(read_calibration(f"targets/{name}", folders), "")
        teachers = teachers_of(f"targets/{name}", folders)
        teachers = [replace(one, cache=CacheParams.model_validate((one.identity or {})["cache"])) for one in teachers]
        keys = [(one.folder, one.format, one.dtype, one.cache) for one in teachers]
        scorers = {key: one.scorer(Task(params.task), params) for key, one in zip(keys, teachers, strict=True)}  # a model is loaded once
        self._asked = [(scorers[key], one.contexts) for key, one in zip(keys, teachers, strict=True)]

    def answer(self, rows: Sequence[tuple[Input, Prediction]]) -> list[Prediction]:
        """The student's predictions of inputs; in the place of one that is not `answered`, what the target set says.

        If a teacher fails, or the limit is reached, the student's own stays, not answered; both are counted, the first failure is said.
        """
        found = [own if own.error else replace(own, by=self._predictor.student.name) for _, own in rows]
        places = [place for place, (_, own) in enumerate(rows) if not own.answered]
        if not places:
            return found
        taken = places[: int(min(self._left, len(places)))]
        self._left -= len(taken)
        self.counts["over the limit"] += len(places) - len(taken)
        probabilities = self._ask([self._predictor.example(rows[place][0]) for place in taken]) if taken else []
        for place, shares in zip(taken, probabilities, strict=True):
            if shares is not None:
                label, own = self._predictor.labels[int(shares.argmax())], rows[place][1]
                shown = dict(zip(self._predictor.labels, shares.tolist(), strict=True))
                found[place] = replace(
                    own, label=label, confidence=shown[label], probabilities=shown, answered=True, by=self.name, student_answer=own
                )
        return found

    def _ask(self, examples: Sequence[Example]) -> list[np.ndarray | None]:
        """Each text's probabilities [L], or None."""
        try:
            scores = [scorer.label_scores(contexts, examples, "") for scorer, contexts in self._asked]
            found = list(self._combination.ensemble(np.concatenate(scores)))
        except (ShotlessError, OSError, RuntimeError) as error:  # a teacher costs its answer, not the service (torch: RuntimeError)
            if isinstance(error, UsageError) and len(examples) > 1:  # a text that cannot be asked costs no other one its answer
                return [shares for example in examples for shares in self._ask([example])]
            if not self.counts["failed"]:
                print(f"warning: {self.name} gave no answer: {error}. Answers go on; failures are counted.", file=sys.stderr, flush=True)
            self.counts["failed"] += len(examples)
            return [None] * len(examples)
        self.counts["answered"] += len(found)
        return found
