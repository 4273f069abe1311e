"""How an example becomes text, and a label becomes tokens.

A prompt is `context + query`; the teacher's has demonstrations in its context, the student's context is empty. Context and query are
tokenised apart and joined as ids, so that a context's ids are the same in front of every query and its keys and values can be shared.

A control token of the model (`<|im_end|>`) that somebody's text spells out is tokenised as the characters it is, so that no input ends its
own prompt or speaks as another voice. A template that uses control tokens itself has them; a text that spells one then has a fault.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.errors import UsageError
from pipeline.params import CompletionParams, TaskParams

TEXT_TOKENS = 512
"""Tokens that a text read token by token is taken to have at most, where a cache's shards are sized."""


@dataclass(frozen=True)
class Task:
    """Template and verbalisers as text. `params.template` names the input fields in braces: `"Review: {text}\\nSentiment:"`."""

    params: TaskParams

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The input fields that the template names, in order."""
        return self.params.fields

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the params; every probability vector follows it."""
        return self.params.labels

    @property
    def answers_are_given(self) -> bool:
        """Whether answers are free text that stands in the data."""
        return self.params.completion is not None and self.params.completion.source == "given"

    @property
    def reads_texts(self) -> bool:
        """Whether what is asked for is the input itself, token by token."""
        return self.params.completion is not None and self.params.completion.source == "text"

    def of_texts(self) -> "Task":
        """The same inputs, with every token of theirs behind the first as the answer."""
        text = CompletionParams(source="text", max_tokens=TEXT_TOKENS)
        return Task(self.params.model_copy(update={"verbalisers": {}, "completion": text}))

    def query(self, fields: Mapping[str, str]) -> str:
        """The text of an input, up to the answer position."""
        return self.params.template.format_map(fields)

    def demonstration(self, fields: Mapping[str, str], answer: str) -> str:
        """The text of an example inside a context: its input and its label, or its answer in free text."""
        completion = self.params.completion
        text = self.params.verbalisers[answer] if completion is None else completion.lead + answer
        return self.query(fields) + text + self.params.separator

    def context(self, demonstrations: Sequence[tuple[Mapping[str, str], str]], instruction: str = "") -> str:
        """An instruction, then the demonstrations in their order. Empty for a zero-shot prompt."""
        head = instruction + self.params.separator if instruction else ""
        return head + "".join(self.demonstration(fields, label) for fields, label in demonstrations)


class TaskTokens:
    """A task in one tokenizer's ids.

    Raises UsageError where two verbalisers begin with the same token or one has no token: the first token alone must tell labels
    apart, else their probabilities at the answer position mean nothing.
    """

    def __init__(self, task: Task, tokenizer: Any) -> None:
        self.task = task
        self._tokenizer = tokenizer
        self._control_tokens = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._own_text = _own_text(task.params)
        self._has_control_tokens = any(token in self._own_text for token in self._control_tokens)
        # What the tokenizer puts before every text (a beginning-of-text token, or nothing); an end token is not part of a prompt.
        special = tokenizer("").input_ids if tokenizer.bos_token_id is not None else []
        self.bos: list[int] = [i for i in special if i == tokenizer.bos_token_id][:1]
        self.completions: list[list[int]] = [self._completion(text) for text in task.params.verbalisers.values()]
        """Token ids of each label's verbaliser; none where answers are free text."""
        self._check_completions()

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer there may be."""
        if self.task.params.completion is not None:
            return self.task.params.completion.max_tokens
        return max(map(len, self.completions))

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of given answers where they stand after a query, each ending with the text that ends an answer.

        Raises UsageError where one is longer than `task.completion.max_tokens`: it would be cut.
        """
        completion = self.task.params.completion
        assert completion is not None
        ends = [answer if any(stop in answer for stop in completion.stop) else answer + completion.stop[0] for answer in answers]
        ids = self.query_ids([completion.lead + answer for answer in ends])
        longest = max(range(len(ids)), key=lambda number: len(ids[number]), default=None)
        if longest is not None and len(ids[longest]) > completion.max_tokens:
            raise UsageError(
                f"task.completion.max_tokens: {completion.max_tokens}, and an answer has {len(ids[longest])} tokens "
                f"({answers[longest][:80]!r}…); raise it, or shorten the answers."
            )
        return ids

    def fault_of(self, query: str) -> str | None:
        """Why a rendered query cannot be told from the template's own text; None where it can."""
        if not self._has_control_tokens:
            return None
        blank = self.task.query(dict.fromkeys(self.task.fields, ""))
        spelt = next((token for token in self._control_tokens if query.count(token) != blank.count(token)), None)
        return None if spelt is None else f"holds {spelt}, a control token of this model, and the task's template uses such tokens itself"

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, split_special_tokens=not self._has_control_tokens).input_ids

    def _encode(self, text: str) -> list[int]:
        return self._ids([text])[0]

    def _completion(self, verbaliser: str) -> list[int]:
        """Ids of a verbaliser where it stands after a query; encoded alone where the boundary merges."""
        query = self.task.query(dict.fromkeys(self.task.fields, "x"))
        before, whole = self._encode(query), self._encode(query + verbaliser)
        return whole[len(before) :] if whole[: len(before)] == before else self._encode(verbaliser)

    def _check_completions(self) -> None:
        if self.task.params.completion is not None:
            return
        first: dict[int, str] = {}
        for label, ids in zip(self.task.labels, self.completions, strict=True):
            verbaliser = self.task.params.verbalisers[label]
            if not ids:
                raise UsageError(f"task.verbalisers.{label}: {verbaliser!r} has no token in this tokenizer; give it a visible text.")
            if (other := first.setdefault(ids[0], label)) != label:
                raise UsageError(
                    f"task.verbalisers: {other!r} and {label!r} both begin with token {ids[0]} "
                    f"({self._tokenizer.decode(ids[0])!r}), so the answer position cannot tell them apart; "
                    "choose verbalisers whose first tokens differ."
                )

    def prefix_ids(self, context: str) -> list[int]:
        """Ids of a context, with the beginning-of-text token where this tokenizer has one. May be empty."""
        return self.bos + (self._encode(context) if context else [])

    def query_ids(self, queries: Sequence[str]) -> list[list[int]]:
        """Ids of rendered queries, which follow any context's ids. One batched call: fast tokenizers use all cores."""
        return self._ids(list(queries)) if queries else []


def _own_text(params: TaskParams) -> str:
    """All that a task's author wrote of a prompt, to look for control tokens in."""
    completion = params.completion
    answers = params.verbalisers.values() if completion is None else [completion.lead, *completion.stop]
    return "\n".join([params.template, params.separator, *answers])
