"""What is asked of the model: template, verbalisers, or the form of an answer in free text."""

import string
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from pipeline.errors import choices
from pipeline.params.base import Frozen

RESERVED_FIELDS = frozenset({"example_id", "label", "completion", "source", "line"})


class FormParams(Frozen):
    """A JSON object that an answer has to be: what counts as well formed, and what is compared."""

    keys: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = Field(min_length=1)
    """Each key the object has → the values it may take; none listed: any text that is not empty."""
    label: str | None = None
    """The key whose value is compared with the gold label of an evaluation set."""

    @model_validator(mode="after")
    def _label_is_a_choice(self) -> Self:
        if self.label is not None and not self.keys.get(self.label):
            raise ValueError(f"label: {self.label!r} is no key with listed values; `keys` has {choices(self.keys)}")
        return self


class CompletionParams(Frozen):
    """Free text as an answer, where no verbalisers are given."""

    source: Literal["generated", "given", "text"] = "generated"
    """Written by the teacher in its context, or read from the data (`data.sources.*.completion`). `text`, the input's own tokens, is what a
    teacher with `reads: texts` is asked; a task is not."""
    max_tokens: PositiveInt = 64
    stop: tuple[str, ...] = Field(default=("\n",), min_length=1, strict=False)
    """An answer ends with the token that completes one of these texts; the token belongs to it."""
    lead: str = " "
    """What stands between the query and a given answer, in demonstrations too."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the teacher's sampling; 0 takes the most probable token."""
    seed: int = 0
    form: FormParams | None = None
    """What a well-formed answer looks like; null: any."""


class TaskParams(Frozen):
    """What is asked of the model, in text."""

    template: str
    """The query; `{field}` stands for an input field. It ends where the answer begins."""
    verbalisers: dict[str, str] = Field(default={})
    """Label → the text that stands for it, with its leading space where one belongs."""
    completion: CompletionParams | None = None
    """Free answers instead of labels."""
    separator: str = "\n\n"
    """What follows a demonstration."""
    content_free: tuple[str, ...] = Field(default=("N/A",), min_length=1, strict=False)
    """Inputs without content, each put into every field, for contextual calibration (2102.09690)."""
    max_chars: PositiveInt = 2000
    """A longer field value is quarantined."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The field names in the template, in order of first use."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        return tuple(dict.fromkeys(names))

    @property
    def answering(self) -> dict[str, Any] | None:
        """What decides free answers, as JSON: `completion` without the form that judges them; None for labels."""
        return None if self.completion is None else self.completion.model_dump(mode="json", exclude={"form"})

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that examples have: of the verbalisers, or the values of a form's label key; none where answers are free text."""
        form = self.completion.form if self.completion is not None else None
        if form is not None and form.label is not None:
            return form.keys[form.label]
        return tuple(self.verbalisers)

    @model_validator(mode="after")
    def _one_kind_of_answer(self) -> Self:
        if self.completion is not None and self.completion.source == "text":
            raise ValueError("completion.source: `text` is for teachers with `reads: texts`; a task's answers are generated or given")
        if self.completion is None and len(self.verbalisers) < 2:
            raise ValueError(f"verbalisers: {len(self.verbalisers)} given, and a task needs two or more, or `completion` for free answers")
        if self.completion is not None and self.verbalisers:
            raise ValueError("verbalisers and completion are both given; answers are labels or free text: leave one out")
        return self

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        try:
            pieces = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"template {self.template!r}: {error}") from None
        if not self.fields:
            raise ValueError("template names no field; write {text} where the input belongs")
        for _, name, spec, conversion in pieces:
            if name is not None and (not name.isidentifier() or spec or conversion):
                raise ValueError(f"template: {{{name}}} is not a plain field name")
        if clash := RESERVED_FIELDS.intersection(self.fields):
            raise ValueError(f"template: the field name {choices(clash)} is reserved; rename the column with `fields`")
        return self
