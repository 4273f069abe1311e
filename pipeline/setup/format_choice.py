"""Plain text or chat turns: which of the two a model answers better in, on labelled examples that are not in its prompt."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

from pipeline.params import Format, TaskParams
from pipeline.schema import Context, Example
from pipeline.targets.calibration import learn_offsets, normalised
from pipeline.task import Task


def right_answers(
    folder: Path, task: TaskParams, context: Context, examples: Sequence[Example], threads: int | None
) -> dict[Format, tuple[int, int]]:
    """Format → right answers behind a context, as the model gives them and after the default calibration, learnt on the same examples.

    Raises UsageError if the model has no chat template.
    """
    from pipeline.teachers.scorer import Scorer  # brings torch

    gold = np.array([task.labels.index(example.label or "") for example in examples])
    found: dict[Format, tuple[int, int]] = {}
    for form in get_args(Format):
        scorer = Scorer(folder, Task(task, form), work=None, threads=threads)
        scores = normalised(scorer.label_scores([replace(context, format=form)], examples, f"{form} prompts")[0])  # [N, L]
        calibrated = scores - learn_offsets("batch_log", scores, scores)
        found[form] = int((scores.argmax(-1) == gold).sum()), int((calibrated.argmax(-1) == gold).sum())
    return found
