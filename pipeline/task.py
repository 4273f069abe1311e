"""How an example becomes a prompt, and a label becomes tokens.

A prompt is a context and a query. The teacher's context has demonstrations, the student's is empty. The whole prompt is tokenised as one
text, so a teacher sees the ids that any other program would give it; engines share whatever prompts have in common.

A control token of the model (`<|im_end|>`) in somebody's text is tokenised as the characters it is, so that no input ends its own prompt.
If the template has control tokens itself, they stay control tokens, and a text that spells one has a fault.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from pipeline.errors import UsageError
from pipeline.params import CompletionParams, TaskParams
from pipeline.schema import NO_CONTEXT, Context, Example, Prompt


@dataclass(frozen=True)
class Task:
    """Template and verbalisers as text. The template names input fields in braces: `"Review: {text}\\nSentiment:"`."""

    params: TaskParams

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The input fields that the template names, in order."""
        return self.params.fields

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels, sorted. Every probability vector follows this order."""
        return self.params.labels

    @property
    def verbalisers(self) -> list[str]:
        """The text that stands for each label, in the order of `labels`; none if answers are free text."""
        return [self.params.verbalisers[label] for label in self.labels] if self.params.completion is None else []

    @property
    def answers_are_given(self) -> bool:
        """Whether answers are free text that the data have."""
        return self.params.completion is not None and self.params.completion.source == "given"

    def of_input_tokens(self) -> "Task":
        """The same inputs, with every token after the first as the answer."""
        completion = CompletionParams(source="input")
        return Task(self.params.model_copy(update={"verbalisers": {}, "completion": completion}))

    def query(self, fields: Mapping[str, str]) -> str:
        """The text of an input, up to the answer position."""
        return self.params.template.format_map(fields)

    def context_text(self, context: Context) -> str:
        """The instruction, then the demonstrations in their order; empty for a prompt without a context."""
        separator, completion = self.params.separator, self.params.completion
        head = context.instruction + separator if context.instruction else ""
        answered = (
            self.query(fields) + (self.params.verbalisers[answer] if completion is None else completion.lead + answer) + separator
            for fields, answer in context.demonstrations
        )
        return head + "".join(answered)


class TaskTokens:
    """A task in one tokenizer's ids. Raises UsageError if first tokens of verbalisers do not tell labels apart, or one has no token."""

    def __init__(self, task: Task, tokenizer: Any) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self._control_tokens = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        completion = task.params.completion
        answers = task.verbalisers if completion is None else [completion.lead, *completion.stop]
        self._own_text = "\n".join([task.params.template, task.params.separator, *answers])
        # What the tokenizer puts before every text (a beginning-of-text token, or nothing); an end token is not part of a prompt.
        special = tokenizer("").input_ids if tokenizer.bos_token_id is not None else []
        self._bos: tuple[int, ...] = tuple(i for i in special if i == tokenizer.bos_token_id)[:1]
        self.completions: list[list[int]] = [self._completion(text) for text in task.verbalisers]
        """Token ids of each label's verbaliser, in the order of `task.labels`; none if answers are free text."""
        self._check_completions()

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest possible answer."""
        if self.task.params.completion is not None:
            return self.task.params.completion.max_tokens
        return max(map(len, self.completions))

    def prompts(self, context: Context, examples: Sequence[Example]) -> list[Prompt]:
        """One prompt for each example behind `context`. One batched call: fast tokenizers use all cores.

        Raises UsageError if a given answer is longer than `task.completion.max_tokens`, or an input to be read token by token has one.
        """
        if not examples:
            return []
        before, completion = self.task.context_text(context), self.task.params.completion
        texts = [before + self.task.query(example.fields) for example in examples]
        ids = self._encode(texts, context)
        if completion is None or completion.source == "generated":
            return [Prompt(own) for own in ids]
        if completion.source == "given":
            return self._with_given_answers(completion, texts, ids, context, examples)
        start = common_length(self._encode([before], context)[0], ids[0]) if before else len(self._bos)
        if short := [example for example, own in zip(examples, ids, strict=True) if len(own) < start + 2]:
            raise UsageError(
                f"an input of {short[0].source or 'this task'} on line {short[0].line} is one token with its template; "
                "`scores: input_tokens` needs two. Leave it out."
            )
        return [Prompt(own[: start + 1], own[start + 1 :]) for own in ids]

    def fault_of(self, example: Example, context: Context = NO_CONTEXT) -> str | None:
        """Why an input cannot be told from the control tokens of the template or the context's instruction; None if it can."""
        for token in self._control_tokens if self._uses_control_tokens(context.instruction) else ():
            if any(token in text for text in example.fields.values()):
                return f"holds {token}, a control token of this model, and the template or instruction uses such tokens itself"
        return None

    def _uses_control_tokens(self, instruction: str) -> bool:
        return any(token in self._own_text or token in instruction for token in self._control_tokens)

    def _encode(self, texts: Sequence[str], context: Context) -> list[tuple[int, ...]]:
        """Ids of whole texts, each with one beginning-of-text token if this tokenizer has one."""
        split = not self._uses_control_tokens(context.instruction)
        found = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=split).input_ids
        return [tuple(ids) if tuple(ids[:1]) == self._bos else (*self._bos, *ids) for ids in found]

    def _with_given_answers(
        self,
        completion: CompletionParams,
        texts: Sequence[str],
        ids: Sequence[Sequence[int]],
        context: Context,
        examples: Sequence[Example],
    ) -> list[Prompt]:
        answers = [example.completion or "" for example in examples]
        ends = [answer if any(stop in answer for stop in completion.stop) else answer + completion.stop[0] for answer in answers]
        whole = self._encode([text + completion.lead + end for text, end in zip(texts, ends, strict=True)], context)
        prompts = []
        for answer, own, full in zip(answers, ids, whole, strict=True):
            start = common_length(own, full)
            if (length := len(full) - start) > completion.max_tokens:
                raise UsageError(
                    f"task.completion.max_tokens: {completion.max_tokens}, and an answer has {length} tokens ({answer[:80]!r}…). "
                    "Raise it, or shorten the answers."
                )
            prompts.append(Prompt(full[:start], full[start:]))
        return prompts

    def _completion(self, verbaliser: str) -> list[int]:
        """Ids of a verbaliser after a query; encoded alone if the boundary merges."""
        query = self.task.query(dict.fromkeys(self.task.fields, "x"))
        before, whole, alone = (list(ids) for ids in self._encode([query, query + verbaliser, verbaliser], Context("")))
        return whole[len(before) :] if whole[: len(before)] == before else alone[len(self._bos) :]

    def _check_completions(self) -> None:
        first: dict[int, str] = {}
        for label, ids in zip(self.task.labels if self.completions else (), self.completions, strict=True):
            verbaliser = self.task.params.verbalisers[label]
            if not ids:
                raise UsageError(f"task.verbalisers.{label}: {verbaliser!r} has no token in this tokenizer. Give it a visible text.")
            if (other := first.setdefault(ids[0], label)) != label:
                shared = self.tokenizer.decode(ids[0])
                way = "" if shared.strip() else ", or end task.template in a space and write verbalisers without theirs"
                raise UsageError(
                    f"task.verbalisers: {other!r} and {label!r} both begin with token {ids[0]} ({shared!r}), so the answer position cannot "
                    f"tell them apart. Choose verbalisers whose first tokens differ{way}."
                )


class EncoderTokens(TaskTokens):
    """A task in the ids of an encoder with a classification head: the fields alone, with the tokens that its tokenizer puts around them.

    Two fields are a pair; further ones are joined to the second by a line break. The head's labels are its whole vocabulary: the n-th of
    the sorted labels is token n of its logits. So its scores are those of a decoder whose verbalisers have one token each. A control token
    in somebody's text is tokenised as the characters it is. Raises UsageError if answers are free text.
    """

    def __init__(self, task: Task, tokenizer: Any) -> None:
        if task.params.completion is not None:
            raise UsageError("task.completion: answers are free text, which an encoder cannot give. Use a decoder.")
        self.task, self.tokenizer = task, tokenizer
        self.completions = [[number] for number in range(len(task.labels))]

    def prompts(self, context: Context, examples: Sequence[Example]) -> list[Prompt]:
        """One prompt for each example. Raises UsageError for a context: an encoder has none."""
        if context.context_id != NO_CONTEXT.context_id:
            raise UsageError(f"context {context.name!r}: an encoder has nothing in its prompt but the input. Use `demonstrations: 0`.")
        if not examples:
            return []
        first, *others = self.task.fields
        pairs = ["\n".join(example.fields[name] for name in others) for example in examples] if others else None
        found = self.tokenizer([example.fields[first] for example in examples], pairs, split_special_tokens=True, truncation=False)
        return [Prompt(tuple(ids)) for ids in found.input_ids]

    def fault_of(self, example: Example, context: Context = NO_CONTEXT) -> None:
        """No input can be taken for control tokens."""


class TextTokens(TaskTokens):
    """A task in text, for a server that tokenises for itself: prompts have no ids, and labels no completions."""

    def __init__(self, task: Task) -> None:
        self.task, self.tokenizer, self.completions = task, None, []

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest possible answer, about: one for every four bytes."""
        if self.task.params.completion is not None:
            return self.task.params.completion.max_tokens
        return max(len(verbaliser.encode()) // 4 + 1 for verbaliser in self.task.verbalisers)

    def prompts(self, context: Context, examples: Sequence[Example]) -> list[Prompt]:
        """One prompt for each example behind `context`."""
        before = self.task.context_text(context)
        return [Prompt((), request=before + self.task.query(example.fields)) for example in examples]

    def fault_of(self, example: Example, context: Context = NO_CONTEXT) -> None:
        """None is known of: the server reads control tokens in its own way."""


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of ids that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
