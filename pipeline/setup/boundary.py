"""Where a prompt ends and its answer begins: whether models cut it into tokens as they cut the texts that they learnt from.

There a word carries the space in front of it: `Label: yes` is `Label`, `:`, ` yes`. A template that ends in a space, or an answer without
one, asks for other tokens, and accuracy falls without a word (EleutherAI/lm-evaluation-harness #531, stanford-crfm/helm #2467).
"""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.params import Params, TaskParams
from pipeline.schema import NO_CONTEXT, Example
from pipeline.task import Task, TaskTokens

OPENING = ("\n", "\t", "(", "[", "{{", '"', "'", "“", "‘", "«", "=")
"""After these an answer has no space in front."""


def better_form(task: TaskParams) -> TaskParams:
    """The same question with the space between prompt and answer at the answer, if text has one there."""
    template = task.template.rstrip(" ")
    words = {label: _spaced(template, word) for label, word in task.verbalisers.items()}
    return task.model_copy(update={"template": template, "verbalisers": words})


def _spaced(template: str, word: str) -> str:
    bare = word.lstrip(" ")
    if template.endswith(OPENING):
        return bare
    is_wide = any(unicodedata.east_asian_width(text) in "WF" for text in (template[-1:], bare[:1]) if text)
    if is_wide or (template.endswith(">") and not template.endswith(("->", "=>"))):  # scripts without spaces, and control tokens, vary
        return word
    return f" {bare}"


def fitting_form(task: TaskParams, tokenizers: Sequence[Any]) -> TaskParams:
    """`better_form`, or the one with the space in the prompt if only that tells labels apart, as with digits in many tokenizers.

    Raises UsageError if neither does.
    """
    better = better_form(task)
    bare = {label: word.lstrip(" ") for label, word in better.verbalisers.items()}
    try:
        _check(better, tokenizers)
    except UsageError as error:
        spaced = better.model_copy(update={"template": f"{better.template} ", "verbalisers": bare})
        try:
            _check(spaced, tokenizers)
        except UsageError:
            raise error from None
        return spaced
    return better


def _check(task: TaskParams, tokenizers: Sequence[Any]) -> None:
    for tokenizer in tokenizers:
        TaskTokens(Task(task), tokenizer)


def load_tokenizers(params: Params) -> dict[str, Any]:
    """The tokenizers of those models that are there, by name."""
    folders = {name: Path("artifacts") / "models" / name for name in params.models}
    if not any(folder.is_dir() for folder in folders.values()):
        return {}
    from pipeline.models.folders import load_tokenizer  # brings torch

    return {name: load_tokenizer(folder) for name, folder in folders.items() if folder.is_dir()}


def boundary_advice(task: TaskParams, tokenizers: Mapping[str, Any]) -> list[str]:
    """Lines that name the better form, if there is one for these tokenizers; without a tokenizer the text alone decides.

    Raises UsageError if a tokenizer cannot tell the labels apart.
    """
    better = better_form(task)
    if tokenizers:
        found = [f"as {name} learnt them" for name, tokenizer in tokenizers.items() if _differs(task, better, tokenizer)]
    else:  # before digits many tokenizers have the space as a token of its own
        digits = task.template.endswith(" ") and any(word.isdigit() for word in task.verbalisers.values())
        found = [] if better == task or digits else ["as models learn them"]
    words = ", ".join(f"{label}: {word!r}" for label, word in better.verbalisers.items())
    form = f"template: {better.template!r}" + (f", verbalisers: {{{words}}}" if words else "")
    return [f"task: the prompt's end and the answers are not cut into tokens {how}, which costs accuracy. Better: {form}" for how in found]


def _differs(task: TaskParams, better: TaskParams, tokenizer: Any) -> bool:
    """Whether two forms give other tokens, and the better one can be used."""
    given = _ids(task, tokenizer)
    try:
        return given != _ids(better, tokenizer)
    except UsageError:
        return False


def _ids(task: TaskParams, tokenizer: Any) -> list[list[int]]:
    tokens = TaskTokens(Task(task), tokenizer)
    query = tokens.prompts(NO_CONTEXT, [Example(dict.fromkeys(task.fields, "x"), completion="x")])[0].ids
    return [[*query, *completion] for completion in tokens.completions or [[]]]
