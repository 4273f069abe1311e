"""Where a prompt ends and its answer begins: whether models cut it into tokens as they cut the texts that they learnt from.

There a word carries the space in front of it: `Label: yes` is `Label`, `:`, ` yes`. A template that ends in a space, or an answer without
one, asks for other tokens, and accuracy falls without a word (EleutherAI/lm-evaluation-harness #531, stanford-crfm/helm #2467).
"""

import unicodedata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.params import Params, TaskParams
from pipeline.schema import NO_CONTEXT, Example
from pipeline.task import Task, TaskTokens

OPENING = ("\n", "\t", "(", "[", "{{", '"', "'", "“", "‘", "«", "=")
"""After these an answer has no space in front."""


def load_tokenizers(params: Params) -> dict[str, Any]:
    """The tokenizers of those decoders that are there, by name; an encoder is not asked in words."""
    there = {name: folder for name in params.models if (folder := Path("artifacts") / "models" / name).is_dir()}
    if there:
        from pipeline.models.folders import is_encoder, load_config, load_tokenizer  # brings torch

        return {name: load_tokenizer(folder) for name, folder in there.items() if not is_encoder(load_config(folder))}
    return {}


def advice_on(params: Params) -> str:
    """`boundary_advice` for the models that are there; empty if everything is asked in chat turns, which have another end."""
    return boundary_advice(params.task, load_tokenizers(params)) if params.asks_plain_text else ""


def better_form(task: TaskParams) -> TaskParams:
    """The same question with the space between prompt and answer at the answer, if text has one there."""
    template = task.template.rstrip(" ")
    vary = template.endswith(">") and not template.endswith(("->", "=>"))  # a control token

    def spaced(word: str) -> str:
        bare = word.lstrip(" ")
        if template.endswith(OPENING):
            return bare
        has_spaces = not any(unicodedata.east_asian_width(text) in "WF" for text in template[-1:] + bare[:1])
        return f" {bare}" if has_spaces and not vary else word

    return task.model_copy(update={"template": template, "verbalisers": {label: spaced(word) for label, word in task.verbalisers.items()}})


def fitting_form(task: TaskParams, tokenizers: Collection[Any]) -> TaskParams:
    """`better_form`, or the one with the space in the prompt if in that form a tokenizer begins all labels with a token of mere space.

    Many tokenizers do so before digits. Raises UsageError if labels cannot be told apart.
    """
    better = better_form(task)
    begins = [{one.decode(ids[0]) for ids in TaskTokens(Task(better), one).completions} for one in tokenizers]
    if any(len(first) == 1 and not first.pop().strip() for first in begins):
        bare = {label: word.lstrip(" ") for label, word in better.verbalisers.items()}
        better = better.model_copy(update={"template": f"{better.template} ", "verbalisers": bare})
    _ids(better, tokenizers)
    return better


def boundary_advice(task: TaskParams, tokenizers: Mapping[str, Any]) -> str:
    """What names the better form, if there is one for a tokenizer, or without one by the text alone; else an empty string.

    Raises UsageError if a tokenizer cannot tell the labels apart.
    """
    better, given = better_form(task), _ids(task, tokenizers.values())
    try:
        same = _ids(better, tokenizers.values()) == given if tokenizers else better == task
    except UsageError:
        same = True  # the better one cannot be used
    digits = task.template.endswith(" ") and any(map(str.isdigit, task.verbalisers.values()))
    if same or (digits and not tokenizers):  # before digits many tokenizers have the space as a token of its own
        return ""
    words = "".join(f"\n  {label}: {word!r}" for label, word in better.verbalisers.items())
    form = f"template: {better.template!r}" + (f", verbalisers:{words}" if words else "")
    return f"task: the prompt's end and the answers are not cut into tokens as models learnt them, which costs accuracy. Better: {form}"


def _ids(task: TaskParams, tokenizers: Iterable[Any]) -> list[list[int]]:
    """A query's ids with each answer's, for each tokenizer."""
    example, found = Example(dict.fromkeys(task.fields, "x"), completion="x"), list[list[int]]()
    for tokens in (TaskTokens(Task(task), tokenizer) for tokenizer in tokenizers):
        query = tokens.prompts(NO_CONTEXT, [example])[0].ids
        found += [[*query, *completion] for completion in tokens.completions or [[]]]
    return found
