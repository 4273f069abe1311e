"""How an example becomes a prompt, and a label becomes tokens.

A prompt is a context and a query. The teacher's context has demonstrations, the student's is empty. The whole prompt is tokenised as one
text, so a teacher sees the ids that any other program would give it; engines share whatever prompts have in common. The text is plain, or
turns of a conversation as the model's own chat template writes them.

A control token of the model (`<|im_end|>`) in somebody's text is tokenised as the characters it is, so that no input ends its own prompt.
If the template of a plain prompt has control tokens itself, they stay control tokens, and a text that spells one has a fault.

A text that does not fit its model is cut as `task.long_texts` says, at ends of its own tokens, the longest field first; then the whole
prompt is tokenised again. A prompt that fits is tokenised once. Teachers, students and predictors get their prompts here, so all cut alike.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, ClassVar

from pipeline.errors import UsageError
from pipeline.params import LEAST_TOKENS, CompletionParams, Format, TaskParams
from pipeline.schema import NO_CONTEXT, Context, Example, Prompt

JOINT, INPUT = "\ufdd0", "\ufdd1"
"""Not characters: no text has them, and no chat template. One breaks a control token, the other is where an input goes."""
GAP = " … "
"""Between the two ends of a text whose middle was left out."""
OVERLAP = 32
"""Tokens that a window shares with the next one, at most a quarter of it: a sentence on the border is whole in one of them."""
Spans = Mapping[str, Sequence[tuple[int, int]]]
"""Field → first character of each of its tokens and the one after its last."""


class TooLongError(UsageError):
    """An input that does not fit its model, and is not to be cut, or cannot be cut so far."""

    def __init__(self, reason: str, example: Example, step: str) -> None:
        super().__init__(f"{origin_of(example)} is too long: {reason}. {step}")
        self.reason = reason


@dataclass(frozen=True)
class Task:
    """Template and verbalisers as text. The template names input fields in braces: `"Review: {text}\\nSentiment:"`."""

    params: TaskParams
    format: Format = "plain"  # of the prompt: `context_text` and `query`, or `messages`

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
        """The same inputs as plain text, with every token after the first as the answer."""
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

    def messages(self, context: Context, query: str) -> list[dict[str, str]]:
        """A prompt as turns: the instruction is the system's, each demonstration a user's and an assistant's, the query the last user's."""
        turns = [("system", context.instruction)] if context.instruction else []
        for fields, answer in context.demonstrations:
            text = self.params.verbalisers[answer] if self.params.completion is None else answer
            turns += [("user", self.query(fields)), ("assistant", text)]
        return [{"role": role, "content": text.strip()} for role, text in [*turns, ("user", query)]]


class TaskTokens:
    """A task in one tokenizer's ids; `limit` is the longest sequence that its model takes, in tokens (None: nothing says it).

    Raises UsageError if a verbaliser has no token, or two cannot be told apart.
    """

    frame: Mapping[str, str] = {}
    """What a chat template writes around an input and its answer (`ChatTokens`); empty for plain text."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end an answer in free text, beside those of the model's own settings."""

    def __init__(self, task: Task, tokenizer: Any, limit: int | None = None) -> None:
        self.task, self.tokenizer, self.limit = task, tokenizer, limit
        self._control_tokens = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        completion = task.params.completion
        answers = task.verbalisers if completion is None else [completion.lead, *completion.stop]
        self._own_text = "\n".join([task.params.template, task.params.separator, *answers])
        # What the tokenizer puts before every text (a beginning-of-text token, or nothing); an end token is not part of a prompt.
        special = tokenizer("").input_ids if tokenizer.bos_token_id is not None else []
        self._bos: tuple[int, ...] = tuple(i for i in special if i == tokenizer.bos_token_id)[:1]
        self.completions: list[list[int]] = self._completions()
        """Token ids of each label's verbaliser, in the order of `task.labels`; none if answers are free text.

        If the ids of one begin those of another, each goes on to what ends an answer in demonstrations, and is told apart by it. Else
        nothing is added: the probabilities of labels add up to at most 1 without ends too, and a label of one token costs no more.
        """

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest possible answer."""
        if self.task.params.completion is not None:
            return self.task.params.completion.max_tokens
        return max(map(len, self.completions))

    def tokens_of(self, prompt: Prompt) -> int:
        """Tokens of a prompt with its answer, or with the longest one that it may get."""
        return prompt.length + (self.longest_answer if prompt.answer is None else len(prompt.answer))

    def added_by(self, context: Context) -> int:
        """Tokens that a context adds to a prompt. Raises TooLongError if it leaves too little for an input."""
        probe = [Example(dict.fromkeys(self.task.fields, "some text"), completion="")]
        behind, alone = (self.prompts(own, probe)[0] for own in (context, NO_CONTEXT))
        return behind.length - alone.length

    def prompts(self, context: Context, examples: Sequence[Example]) -> list[Prompt]:
        """One prompt for each example behind `context`; a text that does not fit is cut, and its prompt says so.

        Under `windows` it is cut as under `head_tail`; `windows` gives its windows. Raises TooLongError if it is not to be cut, or the
        context leaves too little, UsageError if a given answer is longer than `task.completion.max_tokens`, or an input to be read token
        by token has one.
        """
        found = self._whole(context, examples)
        for at, excess in enumerate(self._excess(examples, found)):
            if excess > 0:
                _, (prompt,) = self._fitted(context, examples[at], excess, self._cut)
                found[at] = replace(prompt, cut=True)
        return found

    def windows(self, context: Context, examples: Sequence[Example]) -> list[list[Example]]:
        """The windows of each example that make prompts that fit; the example alone if it fits or `task.long_texts` is not `windows`."""
        if self.task.params.long_texts != "windows":
            return [[example] for example in examples]
        excesses = self._excess(examples, self._whole(context, examples))
        return [
            self._fitted(context, example, excess, self._windows)[0] if excess > 0 else [example]
            for example, excess in zip(examples, excesses, strict=True)
        ]

    def _excess(self, examples: Sequence[Example], prompts: Sequence[Prompt]) -> list[int]:
        """By how many tokens each input is too long for the model or for `task.max_tokens`; not positive if it fits."""
        limit, most = self.limit, self.task.params.max_tokens
        # an answer's last token is not read
        found = [0 if limit is None else self.tokens_of(prompt) - 1 - limit for prompt in prompts]
        if most is not None:
            lengths = [sum(map(len, self._spans(example).values())) for example in examples]
            found = [max(excess, length - most) for excess, length in zip(found, lengths, strict=True)]
        return found

    def _fitted(
        self, context: Context, example: Example, excess: int, split: Callable[[Example, Spans, int], list[Example]]
    ) -> tuple[list[Example], list[Prompt]]:
        """An example cut, or in windows, so that the prompts fit. Raises TooLongError if fewer than `LEAST_TOKENS` of it would be left."""
        spans = self._spans(example)
        whole = room = sum(map(len, spans.values()))
        refused, least = self.task.params.long_texts == "refuse", LEAST_TOKENS
        while True:
            room -= excess
            if refused or room < least:
                behind = f" behind context {context.name!r}" if context.context_id != NO_CONTEXT.context_id else ""
                most = "" if self.task.params.max_tokens is None else f" (task.max_tokens: {self.task.params.max_tokens})"
                step = "Leave it out, or let task.long_texts cut it."
                if room < least:
                    demonstrations = "fewer or shorter demonstrations (contexts.*.demonstrations, data.demonstrations.max_words)"
                    shorter = demonstrations if behind else "a shorter template"
                    step = f"At least {LEAST_TOKENS} must fit: take {shorter}, or a model that takes more."
                fit = f"{max(0, room):,} fit {self.tokenizer.name_or_path}{behind}{most}"
                raise TooLongError(f"its text has {whole:,} tokens, and {fit}", example, step)
            pieces = split(example, spans, room)
            prompts = self._whole(context, pieces)
            excess = max(self._excess(pieces, prompts))
            if excess <= 0:
                return pieces, prompts
            least = 1  # what is cut may have a token more than it had in the whole text

    def _spans(self, example: Example) -> dict[str, list[tuple[int, int]]]:
        texts = {name: example.fields[name] for name in self.task.fields}
        settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        if not getattr(self.tokenizer, "is_fast", True):  # it does not say where tokens begin: those of each character alone are counted
            counts = {name: map(len, self.tokenizer(list(text), **settings).input_ids) for name, text in texts.items()}
            return {name: [(at, at + 1) for at, count in enumerate(own) for _ in range(count)] for name, own in counts.items()}
        found = self.tokenizer(list(texts.values()), return_offsets_mapping=True, **settings)
        return dict(zip(texts, found.offset_mapping, strict=True))

    def _cut(self, example: Example, spans: Spans, room: int) -> list[Example]:
        """The example with its longest fields cut, in all to `room` tokens."""
        kept, left = dict[str, int](), room
        for number, name in enumerate(sorted(spans, key=lambda name: len(spans[name]))):
            kept[name] = min(len(spans[name]), left // (len(spans) - number))
            left -= kept[name]
        return [replace(example, fields={name: self._shortened(example.fields[name], spans[name], kept[name]) for name in spans})]

    def _shortened(self, text: str, spans: Sequence[tuple[int, int]], room: int) -> str:
        """The beginning of a text, and its end unless only its `head` is wanted."""
        if room >= len(spans):
            return text
        gap = len(self.tokenizer(GAP, add_special_tokens=False).input_ids)
        tail = 0 if self.task.params.long_texts == "head" else max(0, (room - gap) // 2)
        head = room - gap - tail if tail else room
        start = text[: spans[head][0]].rstrip()
        return f"{start}{GAP}{text[spans[-tail - 1][1] :].lstrip()}" if tail else start

    def _windows(self, example: Example, spans: Spans, room: int) -> list[Example]:
        """The example once for each window of its longest field; the others are cut to half of `room` if they have more."""
        longest = max(spans, key=lambda name: len(spans[name]))
        others = {name: own for name, own in spans.items() if name != longest}
        (cut,) = self._cut(example, others, room // 2) if others else [example]
        own = spans[longest]
        size = min(len(own), room - min(sum(map(len, others.values())), room // 2))
        starts = [*range(0, len(own) - size, size - min(OVERLAP, size // 4)), len(own) - size]
        texts = [example.fields[longest][own[start][0] : own[start + size - 1][1]].strip() for start in starts]
        return [replace(example, fields={**example.fields, **cut.fields, longest: text}) for text in texts if text]

    def _whole(self, context: Context, examples: Sequence[Example]) -> list[Prompt]:
        """The prompts of uncut examples. One batched call: fast tokenizers use all cores."""
        if not examples:
            return []
        (before, after), completion = self._around(context), self.task.params.completion
        texts = [before + self._input(example) + after for example in examples]
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

    def _around(self, context: Context) -> tuple[str, str]:
        """What stands before and after an input."""
        return self.task.context_text(context), ""

    def _input(self, example: Example) -> str:
        return self.task.query(example.fields)

    def _answer(self, text: str) -> str:
        """A verbaliser, or an answer that is given, as it follows a prompt."""
        completion = self.task.params.completion
        return text if completion is None else completion.lead + text

    def _stop(self, completion: CompletionParams) -> str:
        """What ends an answer in free text that has no end."""
        return completion.stop[0]

    def _uses_control_tokens(self, instruction: str) -> bool:
        return any(token in self._own_text or token in instruction for token in self._control_tokens)

    def _encode(self, texts: Sequence[str], context: Context) -> list[tuple[int, ...]]:
        """Ids of whole texts, each with one beginning-of-text token if this tokenizer has one."""
        split = not self._uses_control_tokens(context.instruction)
        found = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=split, verbose=False).input_ids
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
        ends = ["" if any(stop in answer for stop in completion.stop) else self._stop(completion) for answer in answers]
        whole = self._encode([text + self._answer(answer) + end for text, answer, end in zip(texts, answers, ends, strict=True)], context)
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

    def answer_ids(self, text: str, has_ended: bool) -> list[int]:
        """Ids of an answer in free text that somebody else wrote, up to what ends it: put behind it if it `has_ended` without."""
        completion = self.task.params.completion
        assert completion is not None
        ends = [(text.index(stop), stop) for stop in completion.stop if stop in text]
        at, end = min(ends, default=(len(text), self._stop(completion) if has_ended or not text.strip() else ""))
        return self._following("", self._answer(text[:at].strip()) + end)[: completion.max_tokens]

    def _completions(self) -> list[list[int]]:
        words = self.task.verbalisers
        answers = [self._answer(text) for text in words]
        found = [self._following("", answer) for answer in answers]
        for label, ids, text in zip(self.task.labels, found, words, strict=bool(words)):
            if not ids:
                raise UsageError(f"task.verbalisers.{label}: {text!r} has no token in this tokenizer. Give it a visible text.")
        if _beginning(found):
            found = [ids + self._end(answer) for ids, answer in zip(found, answers, strict=True)]
        if pair := _beginning(found):
            (one, ids), (other, others) = ((self.task.labels[number], found[number]) for number in pair)
            raise UsageError(
                f"task.verbalisers: {one!r} and {other!r} cannot be told apart: their tokens are {ids} and {others}. Give one another text."
            )
        return found

    def _end(self, answer: str) -> list[int]:
        """The token that ends an answer in demonstrations."""
        return self._following(answer, self.task.params.separator, self._example_query)[:1]

    @property
    def _example_query(self) -> str:
        return self._input(Example(dict.fromkeys(self.task.fields, "x"))).join(self._around(NO_CONTEXT))

    def _following(self, before: str, text: str, after: str = "") -> list[int]:
        """Ids of a text behind a query and what answers it; encoded alone if the boundary merges."""
        head = self._example_query + before
        start, whole, alone, empty = map(list, self._encode([head, head + text + after, text + after, ""], NO_CONTEXT))
        return whole[len(start) :] if whole[: len(start)] == start else alone[len(empty) :]


class ChatTokens(TaskTokens):
    """A task in the ids of a chat model: turns of a conversation, as the tokenizer's own chat template writes them.

    Prompts are `apply_chat_template` of `Task.messages`, token by token, with the generation prompt and with thinking switched off, if the
    template knows how. So there is one beginning-of-text token if the template writes it, and none if not. If the template has no system
    turn, the instruction begins the first user's turn. A template that writes today's date writes a fixed one. A control token in a text is
    tokenised as the characters it is; if this tokenizer cannot be asked for that, such an input has a fault.

    `frame` is what the template writes around an input that has no context: `before` and `after` it, `lead` in front of its answer, `end`
    behind that. It is asked of the tokenizer, which needs no template if it is given. Raises UsageError if there is no template, it cannot
    be rendered, or the task's own template has control tokens.
    """

    FIXED_DATE: ClassVar = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"  # else prompts would differ from day to day

    def __init__(self, task: Task, tokenizer: Any, limit: int | None = None, frame: Mapping[str, str] | None = None) -> None:
        self.tokenizer = tokenizer
        self._special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        if used := self._control.search("\n".join([task.params.template, *task.verbalisers])):
            raise UsageError(f"task: {used[0]} is a control token, which a chat template writes. Leave it out, or use `format: plain`.")
        self.frame = frame or self._read_frame()
        super().__init__(task, tokenizer, limit)
        *_, end = self._sections(self.frame["end"])
        self.end_ids = (end,)
        sample = 'Größe: 5 €  "1,024" \n\nx '.join(self._around(NO_CONTEXT))
        self._splits = self._sections(sample) == self._encode([sample], NO_CONTEXT)[0]

    def fault_of(self, example: Example, context: Context = NO_CONTEXT) -> str | None:  # noqa: ARG002
        """Why an input cannot be told from the control tokens of the model; None if it can."""
        for text in example.fields.values():
            if mark := next((mark for mark in (JOINT, INPUT) if mark in text), None):
                return f"holds U+{ord(mark):X}, which is not a character"
            if not self._splits and (token := self._control.search(text)):
                return f"holds {token[0]}, a control token of this model, and its tokenizer cannot take it for text in a conversation"
        return None

    def _read_frame(self) -> dict[str, str]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                f"{self.tokenizer.name_or_path}: `format: chat`, and its tokenizer has no chat template. Take an instruct model, or use "
                "`format: plain`."
            )
        before, after = self._rendered([{"role": "user", "content": INPUT}])
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": INPUT}]
        head, tail = self._rendered(turns, add_generation_prompt=False)
        asked = f"{before}x{after}"
        lead = head.removeprefix(asked) if head.startswith(asked) else ""  # else it begins an answer with thoughts, but shows none
        token = self._control.search(tail)
        return {"before": before, "after": after, "lead": lead, "end": tail[: token.end()] if token else self.tokenizer.eos_token or "\n"}

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> tuple[str, str]:
        """The text of a conversation before and after `INPUT`."""
        template = self.tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = self.FIXED_DATE + template
        try:
            asked = {"chat_template": template, "add_generation_prompt": add_generation_prompt, "enable_thinking": False}
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **asked)
            before, after = text.split(INPUT)
        except Exception as error:  # a template may raise anything  # noqa: BLE001
            raise UsageError(f"{self.tokenizer.name_or_path}: its chat template cannot be used ({error}). Use `format: plain`.") from None
        return before, after

    @cached_property
    def _has_system_turn(self) -> bool:
        try:
            return bool(self._rendered([{"role": "system", "content": INPUT}, {"role": "user", "content": "x"}]))
        except UsageError:
            return False

    def _around(self, context: Context) -> tuple[str, str]:
        if not context.instruction and not context.demonstrations:
            return self.frame["before"], self.frame["after"]
        if used := self._control.search(context.instruction):
            raise UsageError(f"contexts: the instruction of {context.name} holds {used[0]}, a control token of this model. Leave it out.")
        messages = [turn | {"content": self._as_text(turn["content"])} for turn in self.task.messages(context, INPUT)]
        if context.instruction and not self._has_system_turn:
            system, first, *others = messages
            messages = [first | {"content": f"{system['content']}\n\n{first['content']}"}, *others]
        return self._rendered(messages)

    def _input(self, example: Example) -> str:
        return self._as_text(super()._input(example).strip())

    def _answer(self, text: str) -> str:
        return self.frame["lead"] + self._as_text(text.strip())

    def _stop(self, completion: CompletionParams) -> str:  # noqa: ARG002
        return self.frame["end"]

    def _end(self, answer: str) -> list[int]:  # noqa: ARG002
        return list(self._sections(self.frame["end"]))

    def _as_text(self, text: str) -> str:
        """A text whose control tokens are broken by a mark, which `_encode` takes out."""
        return self._control.sub(lambda token: f"{token[0][0]}{JOINT}{token[0][1:]}", text)

    def _encode(self, texts: Sequence[str], context: Context) -> list[tuple[int, ...]]:  # noqa: ARG002
        found = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=False, verbose=False).input_ids
        return [self._sections(text) if JOINT in text else tuple(ids) for text, ids in zip(texts, found, strict=True)]

    def _sections(self, text: str) -> tuple[int, ...]:
        """Ids of the control tokens that are not broken, and of what stands between them, as text."""
        parts = self._control.split(text)  # control tokens are at odd places
        between = [part.replace(JOINT, "") for part in parts[::2]]
        ids: list[list[int]] = self.tokenizer(between, add_special_tokens=False, split_special_tokens=True).input_ids
        control = [[self._special[token]] for token in parts[1::2]]
        return tuple(number for pair in zip(ids, [*control, []], strict=True) for own in pair for number in own)


class EncoderTokens(TaskTokens):
    """A task in the ids of an encoder with a classification head: the fields alone, with the tokens that its tokenizer puts around them.

    Two fields are a pair; further ones are joined to the second by a line break. The head's labels are its whole vocabulary: the n-th of
    the sorted labels is token n of its logits. So its scores are those of a decoder whose verbalisers have one token each. A control token
    in somebody's text is tokenised as the characters it is. Raises UsageError if answers are free text.
    """

    def __init__(self, task: Task, tokenizer: Any, limit: int | None = None) -> None:
        if task.params.completion is not None:
            raise UsageError("task.completion: answers are free text, which an encoder cannot give. Use a decoder.")
        if task.format == "chat":
            raise UsageError("`format: chat`, and an encoder reads the input alone. Leave it out.")
        self.task, self.tokenizer, self.limit = task, tokenizer, limit
        self.completions = [[number] for number in range(len(task.labels))]

    def _whole(self, context: Context, examples: Sequence[Example]) -> list[Prompt]:
        """The prompts of uncut examples. Raises UsageError for a context: an encoder has none."""
        if context.context_id != NO_CONTEXT.context_id:
            raise UsageError(f"context {context.name!r}: an encoder has nothing in its prompt but the input. Use `demonstrations: 0`.")
        if not examples:
            return []
        first, *others = self.task.fields
        pairs = ["\n".join(example.fields[name] for name in others) for example in examples] if others else None
        texts, settings = [example.fields[first] for example in examples], {"truncation": False, "verbose": False}
        found = self.tokenizer(texts, pairs, split_special_tokens=True, **settings)
        return [Prompt(tuple(ids)) for ids in found.input_ids]

    def fault_of(self, example: Example, context: Context = NO_CONTEXT) -> None:
        """No input can be taken for control tokens."""


class TextTokens(TaskTokens):
    """A task in text or turns, for a server that tokenises for itself: prompts have no ids, labels no completions, nothing is cut.

    Answers in free text are put into the ids of `answers`, the same task for the tokenizer of those who learn them.
    """

    def __init__(self, task: Task, answers: TaskTokens | None = None) -> None:
        self.task, self._answers, self.limit, self.completions = task, answers, None, []
        if answers is not None:
            self.tokenizer, self.end_ids = answers.tokenizer, answers.end_ids

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest possible answer, about: one for every four bytes."""
        if self.task.params.completion is not None:
            return self.task.params.completion.max_tokens
        return max(len(verbaliser.encode()) // 4 + 1 for verbaliser in self.task.verbalisers)

    def answer_ids(self, text: str, has_ended: bool) -> list[int]:
        """See `TaskTokens`."""
        assert self._answers is not None
        return self._answers.answer_ids(text, has_ended)

    def _excess(self, examples: Sequence[Example], prompts: Sequence[Prompt]) -> list[int]:  # noqa: ARG002
        return [0] * len(examples)

    def _whole(self, context: Context, examples: Sequence[Example]) -> list[Prompt]:
        queries = [self.task.query(example.fields) for example in examples]
        if self.task.format == "chat":
            turns = [[(turn["role"], turn["content"]) for turn in self.task.messages(context, query)] for query in queries]
            return [Prompt((), request=tuple(own)) for own in turns]
        before = self.task.context_text(context)
        return [Prompt((), request=before + query) for query in queries]

    def fault_of(self, example: Example, context: Context = NO_CONTEXT) -> None:
        """None is known of: the server reads control tokens in its own way."""


def _beginning(completions: Sequence[list[int]]) -> tuple[int, int] | None:
    """The indices of two completions of which one is a prefix of the other, or equal to it; None if there is no such pair."""
    ordered = sorted(range(len(completions)), key=completions.__getitem__)  # a prefix comes right before something that it begins
    return next((pair for pair in pairwise(ordered) if completions[pair[1]][: len(completions[pair[0]])] == completions[pair[0]]), None)


def origin_of(example: Example) -> str:
    """Where an input comes from, for messages."""
    return f"the input on line {example.line} of {example.source}" if example.source else f"example {example.example_id[:12]}"


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of ids that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
