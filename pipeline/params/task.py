"""What is asked of the model: template and verbalisers, or the form of an answer in free text; and what all params share."""

import re
import string
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator

from pipeline.errors import choices

SLUG = re.compile(r"[a-z0-9][a-z0-9_-]*")


def _slug(name: str) -> str:
    if not SLUG.fullmatch(name):
        raise ValueError(f"{name!r} is not a name of small letters, digits, '-' and '_', as DVC stages need")
    return name


def _key(name: str) -> str:
    if name in {"size", "nfiles"}:  # `dvc.stage.cache` takes them out of params, at any depth, before it hashes them
        raise ValueError(f"DVC's run cache overlooks what is called {name!r}, and would take an older run for this one; rename it")
    return name


Key = Annotated[str, AfterValidator(_key)]
"""A key of a map whose keys are the user's own."""
Name = Annotated[Key, AfterValidator(_slug)]
Format = Literal["plain", "chat"]
"""Of a prompt: text, or turns of a conversation by the model's chat template."""
Fraction = Annotated[float, Field(ge=0, le=1)]


class Frozen(BaseModel):
    """Immutable, and strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


LEAST_TOKENS = 16
"""Of an input's text, that a context must leave."""
RESERVED_FIELDS = frozenset({"example_id", "label", "completion", "source", "line"})


class FormParams(Frozen):
    """Answers are JSON objects: which keys make one well formed, and which key is compared."""

    keys: dict[Key, Annotated[tuple[str, ...], Field(strict=False)]] = Field(min_length=1)
    """Key of the object → the values it may have; an empty list: any text that is not empty."""
    label: str | None = None
    """The key whose value is compared with the gold label of an evaluation set."""

    @model_validator(mode="after")
    def _label_is_a_choice(self) -> Self:
        if self.label is not None and not self.keys.get(self.label):
            raise ValueError(f"label: {self.label!r} is not a key with listed values; `keys` has {choices(self.keys)}")
        return self


class CompletionParams(Frozen):
    """Free text as an answer, in place of verbalisers."""

    source: Literal["generated", "given", "input"] = "generated"
    """`generated`: the teacher writes them in its context. `given`: they are read from the data (`data.sources.*.completion`). `input` is
    for teachers with `scores: input_tokens`; a task cannot use it."""
    max_tokens: PositiveInt = 64
    """Most tokens of an answer; a longer one that is given stops the run."""
    stop: tuple[str, ...] = Field(default=("\n",), min_length=1, strict=False)
    """An answer ends with the token that completes one of these texts; the token belongs to it."""
    lead: str = " "
    """Text between the query and a given answer, in demonstrations too."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the teacher's sampling; 0 takes the most probable token."""
    seed: int = 0
    """Of the teacher's sampling."""
    form: FormParams | None = None
    """What a well-formed answer is; null: any answer is."""


class TaskParams(Frozen):
    """What a model is asked, and how it answers."""

    template: str
    """The prompt of one input; `{field}` is an input field. It ends where the answer begins."""
    verbalisers: Annotated[dict[Key, str], AfterValidator(lambda words: dict(sorted(words.items())))] = Field(default={})
    """Label → the text that stands for it, with its leading space if it needs one. The order does not matter."""
    completion: CompletionParams | None = None
    """Answers in free text, instead of labels."""
    separator: str = "\n\n"
    """Text after each demonstration."""
    content_free: tuple[str, ...] = Field(default=("N/A",), min_length=1, strict=False)
    """Inputs without content, each put into every field, for contextual calibration (2102.09690)."""
    long_texts: Literal["refuse", "head", "head_tail", "windows"] = "head_tail"
    """Of a text that does not fit a model beside its context: `head` keeps the beginning, `head_tail` the beginning and the end. `windows`
    reads all of it, piece by piece: an unlabelled text becomes several, elsewhere probabilities are averaged. `refuse` stops the run."""
    max_tokens: Annotated[int, Field(ge=LEAST_TOKENS)] | None = None
    """Most tokens of an input's text, in all fields; a longer one does not fit. null: as many as the model takes."""

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
        """The labels that examples have, sorted: of the verbalisers, or the values of a form's label key; none if answers are free text."""
        form = self.completion.form if self.completion is not None else None
        return tuple(sorted(form.keys[form.label] if form is not None and form.label is not None else self.verbalisers))

    @model_validator(mode="after")
    def _one_kind_of_answer(self) -> Self:
        if self.completion is not None and self.completion.source == "input":
            raise ValueError("completion.source: `input` is for teachers with `scores: input_tokens`; a task's are generated or given")
        if (count := len(self.verbalisers)) < 2 and self.completion is None:
            raise ValueError(f"verbalisers: {count} given, and a task needs two or more, or `completion` for answers in free text")
        labels: dict[str, str] = {}
        for label, text in self.verbalisers.items():
            if (other := labels.setdefault(text, label)) != label:
                raise ValueError(f"verbalisers: {other!r} and {label!r} are both {text!r}, so no answer tells them apart; change one")
        if self.completion is not None and self.verbalisers:
            raise ValueError("verbalisers and completion are both given; answers are labels or free text: leave one out")
        if self.completion is not None and self.long_texts == "windows":
            raise ValueError("long_texts: `windows` averages the probabilities of labels, and answers are free text; choose `head_tail`")
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
