"""Plain text or chat turns: which of the two a model answers better in, on labelled examples that are not in its prompt."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline.data.contexts import build_contexts
from pipeline.errors import UsageError
from pipeline.files import sha256_text
from pipeline.params import Format, TaskParams, parse_params
from pipeline.schema import NO_CONTEXT, Context, Example
from pipeline.targets.calibration import learn_offsets, normalised
from pipeline.task import Task, TaskTokens

COMPARED, COMPARED_TOKENS = 32, 3000
"""Labelled examples that are asked at most, and their tokens with those of all labels, so that `init` stays short."""
LEAST = 8
"""If fewer are left beside the demonstrations, half of the demonstrations are asked about the others."""


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


def choose_formats(
    raw: dict[str, Any], demonstrations: Sequence[Example], labelled: Sequence[Example], tokenizers: Mapping[str, Any]
) -> Iterator[str]:
    """Set `format: chat` on the contexts in which their model answers more right so; yields a line on what each got.

    Compared are contexts with demonstrations whose teachers are one model that is there and has a chat template, if the params may have it.
    """
    params = parse_params(raw)
    for name, entry in params.contexts.items():
        models = {teacher.model for teacher in params.teachers.values() if teacher.contexts == name}
        model = models.pop().removeprefix("models/") if len(models) == 1 else ""
        chat = copy.deepcopy(raw)
        chat["contexts"][name]["format"] = "chat"
        try:
            parse_params(chat)
        except UsageError:  # a student learns the tokens of its answers, or it was tuned in the other format
            continue
        if not entry.demonstrations or not getattr(tokenizers.get(model), "chat_template", None):
            continue
        context = build_contexts(name, entry, Task(params.task), demonstrations, params.data.seed)[0]
        context, asked = _held_out(context, labelled, params.task)
        tokens = TaskTokens(Task(params.task), tokenizers[model])
        of_labels = sum(len(ids) - 1 for ids in tokens.completions)
        lengths = accumulate(len(prompt.ids) + of_labels for prompt in tokens.prompts(NO_CONTEXT, asked))
        asked = [one for one, length in zip(asked, lengths, strict=True) if length <= COMPARED_TOKENS][:COMPARED]
        if not asked:
            continue
        folder = Path("artifacts") / "models" / model
        try:
            found = right_answers(folder, params.task, context, asked, params.runtime.threads)
        except UsageError as error:
            yield f"contexts.{name}: plain text, since {error}"
            continue
        (_, plain), (_, turns) = found["plain"], found["chat"]
        if turns > plain:
            raw["contexts"][name]["format"] = "chat"
        better = "chat turns" if turns > plain else "plain text"
        shown = f"of {len(asked)} labelled examples behind {len(context.demonstrations)} others {model} answers"
        yield f"contexts.{name}: {better}; {shown} {plain} right in plain text, {turns} in chat turns"


def _held_out(context: Context, labelled: Sequence[Example], task: TaskParams) -> tuple[Context, list[Example]]:
    """The context, and labelled examples that it does not show, the labels in turn."""
    shown = {Example(fields).example_id for fields, _ in context.demonstrations}
    rest = [example for example in labelled if example.label is not None and example.example_id not in shown]
    if len(rest) < LEAST:
        kept = context.demonstrations[::2]
        rest += [Example(fields, label) for fields, label in context.demonstrations[1::2]]
        context = replace(context, demonstrations=kept)
    rest.sort(key=lambda example: sha256_text(f"format\0{example.example_id}"))
    by_label = [[example for example in rest if example.label == label] for label in task.labels]
    return context, [example for turn in zip_longest(*by_label) for example in turn if example is not None]
