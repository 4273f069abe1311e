"""Teachers, target sets, rounds, students, baselines, evaluation: what each is made of. Then all of params.yaml, and what cannot work."""

import math
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.errors import choices
from pipeline.params.data import DOWNLOADS, ContextParams, DataParams, Download, ModelParams, ServerParams
from pipeline.params.task import Format, Fraction, Frozen, Name, TaskParams

DEMONSTRATIONS_FILE = "data/demonstrations.parquet"
Calibration = Literal["none", "contextual", "batch", "batch_log"]
"""What takes a context's lean out of its scores; `pipeline/targets/calibration.py` says what each is."""


class CacheParams(Frozen):
    """What the score cache keeps of a teacher's distribution over the vocabulary (docs/cache.md)."""

    encoding: Literal["top_k", "top_k_tail", "sampled", "hybrid", "full"] = "hybrid"
    """`top_k`: the most probable entries. `top_k_tail`: the same, and the mass of all others. `sampled`: entries drawn from the
    distribution. `hybrid`: entries of probability 1/`samples` or more, at most `top_k`, and draws from the others. `full`: every entry."""
    top_k: Annotated[int, Field(ge=1)] = 32
    """Most entries kept as they are."""
    samples: Annotated[int, Field(ge=1)] = 96
    """Draws from a whole distribution, for `sampled` and `hybrid`; each has the mass 1/`samples`."""
    resolution_nats: Annotated[float, Field(gt=0, le=1)] | None = 0.0625
    """Log-probabilities are rounded to multiples of it, which makes files smaller; a power of two is best. Null: not rounded."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(), strict=False)
    """Temperatures besides 1 that students may learn at."""
    hidden_layers: tuple[int, ...] = Field(default=(), strict=False)
    """Layers whose output at answer positions is kept in float16; -1 is the last."""


class TeacherParams(Frozen):
    """A model and the contexts it answers in."""

    model: str
    """A model folder under artifacts/: models/NAME, tuned/NAME or students/NAME; or servers/NAME, a model behind a server."""
    contexts: str
    """A list in `contexts`."""
    scores: Literal["answers", "input_tokens"] = "answers"
    """What it gives distributions of: the answer, or every token of the input (for a student's `auxiliary` loss)."""
    cache: CacheParams = CacheParams()
    """What is kept of each distribution. A server gives at most its 20 most probable tokens, which are kept with the others' mass."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the forward pass; `auto` is bfloat16 if the machine has matrix units for it, else float32."""


class TargetParams(Frozen):
    """How teachers' scores become the distribution that a student learns."""

    teachers: dict[str, PositiveFloat] = Field(min_length=1)
    """Teacher → weight. A teacher's contexts share its weight."""
    calibration: Calibration = "batch_log"
    """How a context's lean towards a label is removed: `none`; `contextual`, by content-free inputs (2102.09690); by the mean over the
    transfer set, `batch` of the probability as in the paper (2309.17249), `batch_log` of the log-probability."""
    calibrations: dict[str, Calibration] = Field(default={})
    """Teacher → its own calibration, if it is not `calibration`."""
    calibrate_by: Literal["set", "source"] = "set"
    """Batch calibration over the whole transfer set, or within each of its sources, since a context's lean differs between domains. A
    baseline takes the shift of its evaluation set's source, if that source has one."""
    average: Literal["probability", "log_probability"] = "probability"
    """What is averaged over contexts and teachers."""
    weights: Literal["given", "learned"] = "given"
    """`given`: the weights of `teachers`. `learned`: the teachers' averages are pooled log-linearly, with weights learnt on the labelled
    examples (`pipeline/targets/learning.py`), which none of them had seen; then the weights of `teachers` have no effect."""
    temperature: PositiveFloat | Literal["learned"] = 1.0
    """Of the result; below 1 it becomes sharper. `learned`: on the labelled examples, with a bias for each label."""
    prior: Literal["equal", "labelled", "estimate"] | dict[str, PositiveFloat] | None = None
    """Shares of the labels among the texts, which the result is shifted to: equal ones, those of the labelled source (if it was drawn at
    random), stated ones, or an estimate (from expectation maximisation, Saerens et al. 2002). Null: no shift."""
    auxiliary_caches: tuple[str, ...] = Field(default=(), strict=False)
    """Teachers whose caches students of this set may also learn from (`students.*.auxiliary`)."""

    @model_validator(mode="after")
    def _calibrations_have_a_use(self) -> Self:
        kinds = {self.calibrations.get(teacher, self.calibration) for teacher in self.teachers}
        if self.calibrate_by == "source" and not kinds & {"batch", "batch_log"}:
            raise ValueError(f"`calibrate_by: source` is for `batch` or `batch_log`, and calibration is {self.calibration!r}; leave it out")
        if unknown := set(self.calibrations) - set(self.teachers):
            raise ValueError(f"calibrations: {choices(unknown)} not among its teachers; choose from: {choices(self.teachers)}")
        if self.weights == "learned" and self.temperature not in {1.0, "learned"}:
            raise ValueError(f"temperature: {self.temperature:g}, and learned weights are as sharp as the labels say; leave it out")
        if self.prior == "estimate" and not self.is_learned:
            raise ValueError(
                "`prior: estimate` needs probabilities that labels have corrected; set `weights: learned` or `temperature: learned`"
            )
        return self

    @property
    def is_learned(self) -> bool:
        """Whether labelled examples decide anything here."""
        return "learned" in {self.weights, self.temperature}


class RoundParams(Frozen):
    """A student answers the texts of the transfer set and of the pool, for other students to learn from."""

    student: str
    """Of `students`; its first seed."""
    temperature: PositiveFloat = 1.0
    """Of its answers; below 1 they become sharper."""


class LoraParams(Frozen):
    """Low-rank adapters (2106.09685): W + alpha / rank · B·A beside frozen weights W."""

    rank: PositiveInt = 8
    """Of B·A."""
    alpha: PositiveInt = 16
    """The adapter's scale is alpha / rank."""
    modules: Literal["usual", "all_linear"] = "usual"
    """The linear layers that peft names for the architecture (for Llama the query and value projections), or all but the head."""


class TuningParams(Frozen):
    """How weights are learnt; shared by students and tuned teachers."""

    format: Format = "plain"
    """What an input is to this model: `plain` text, or with `chat` the user's turn in its chat template. A teacher's may be another."""
    steps: Annotated[int, Field(ge=0)]
    """Optimiser steps; 0 is for `tuning: contrastive`, which then leaves the encoder as it is and fits its head."""
    batch_size: PositiveInt = 8
    """Examples in a step."""
    micro_batch: PositiveInt | None = None
    """Examples in a forward pass, to need less memory: a step adds the gradients of several passes. Null: the whole batch."""
    tuning: Literal["full", "lora", "bitfit", "head", "contrastive"] = "full"
    """Which weights are learnt: all, low-rank adapters, biases, or the output layer (docs/students.md). `contrastive`, for an encoder and
    gold labels: texts of one label come together and others apart, then a logistic regression on their embeddings is the head (SetFit,
    2209.11055)."""
    freeze_embeddings: bool = False
    """Leave token and position tables, and a head tied to them, as they are. Every tuning but `full` does so anyway."""
    freeze_layers: Annotated[int, Field(ge=0)] = 0
    """Number of lowest layers that stay as they are, with the embeddings."""
    lora: LoraParams | None = None
    """For `tuning: lora`; null: the defaults."""
    adapters: Literal["merged", "kept"] = "merged"
    """A LoRA student is saved as a plain model; `kept` leaves its adapter in `adapter/` beside it, for use with peft."""
    learning_rate: PositiveFloat = 1e-4
    """Of AdamW, at its highest."""
    warmup: Fraction = 0.1
    """Share of the steps in which the learning rate rises linearly (2305.16938)."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warmup."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Longer gradients are cut to this length."""
    seed: int = 0
    """Of batches, dropout and new weights."""

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> Self:
        if self.tuning == "contrastive" and (self.micro_batch is not None or self.batch_size < 2):
            raise ValueError("`tuning: contrastive` compares the texts of a step: no `micro_batch`, and a `batch_size` of at least 2")
        if self.steps == 0 and self.tuning != "contrastive":
            raise ValueError("steps 0 learn nothing; set more (only `tuning: contrastive` has a head to fit without any)")
        if self.freeze_layers and self.tuning == "head":
            raise ValueError("`freeze_layers` beside `tuning: head`, which learns no layer at all; leave it out")
        for key, given in (("lora", self.lora is not None), ("adapters", self.adapters == "kept")):
            if given and self.tuning != "lora":
                raise ValueError(f"`{key}` is for `tuning: lora`, and tuning is {self.tuning!r}; leave it out, or change the tuning")
        return self


class TunedParams(TuningParams):
    """A teacher's model, tuned on the demonstrations' labels (pattern-based fine-tuning)."""

    base: str
    """A model folder under artifacts/: models/NAME, tuned/NAME or students/NAME."""


class AuxiliaryParams(Frozen):
    """What a student also learns from a score cache: its distributions over the vocabulary, its hidden states, or both."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the mean divergence to the cached distributions; 0: they are not learnt."""
    loss: Literal["kl", "reverse_kl", "jensen_shannon"] = "kl"
    """KL(teacher ‖ student), KL(student ‖ teacher), or their Jensen-Shannon divergence."""
    temperature: PositiveFloat = 1.0
    """Of both distributions: 1, or one of the cache's `temperatures`."""
    hidden_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the distance to the cached hidden states (`pipeline/students/auxiliary.py`); the cache needs `hidden_layers`."""
    layers: tuple[Annotated[tuple[int, int], Field(strict=False)], ...] = Field(default=((-1, -1),), min_length=1, strict=False)
    """Pairs of a teacher's layer, one of its `hidden_layers`, and the student's layer that is to match it; -1 is the last."""
    batch_size: PositiveInt | None = None
    """Rows of the cache in a step; null: the student's batch size."""

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Self:
        if not self.weight and not self.hidden_weight:
            raise ValueError("weight and hidden_weight are both 0, so that nothing is learnt of this cache; leave it out, or set one")
        return self


class StudentParams(TuningParams):
    """A student: where it starts, what it learns from, how."""

    base: str
    """A model folder under artifacts/: models/NAME, tuned/NAME or students/NAME."""
    layers: str | None = None
    """The base's layers to keep, for example `0-19, 26-29`; null keeps all."""
    learn_from: str
    """`targets/NAME`; `rounds/NAME` for another student's answers; `teachers/NAME` for a teacher's cached distributions over the
    vocabulary; or `data/demonstrations.parquet` for the demonstrations' labels alone."""
    temperature: PositiveFloat = 1.0
    """Of both distributions, if `learn_from` is `teachers/NAME`: 1, or one of the cache's `temperatures`."""
    loss: Literal["kl", "reverse_kl", "jensen_shannon", "hard"] = "kl"
    """Between targets and student: KL(target ‖ student), KL(student ‖ target), their Jensen-Shannon divergence, or cross-entropy on the
    target's most probable label."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a cross-entropy that is added to the loss (2412.13243)."""
    ce_target: Literal["demonstrations", "targets"] = "demonstrations"
    """What the cross-entropy is on: the demonstrations' gold labels, or the targets' most probable label."""
    ce_batch_size: PositiveInt | None = None
    """Demonstrations a step for the cross-entropy on their gold labels; null: a quarter of `batch_size`, at least one."""
    class_weight: Literal["balanced"] | None = None
    """`balanced`: each text's loss over the labels counts 1 / (labels × share of texts with its most probable label), at most 10, so that
    rare labels count as much as frequent ones; null: every text counts alike."""
    auxiliary: dict[str, AuxiliaryParams] = Field(default={})
    """Teacher → what is learnt of its cache too. The target set lists the teacher in `auxiliary_caches`, or it is that of `learn_from`."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1, strict=False)] | None = None
    """Train once with each of these instead of `seed`; results are means over them. The student's folder is that of the first, the others
    are in its `seeds/`."""
    held_back: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the texts of a target set or a round that is not learnt from, and tells how far the student may be trusted: it gives the
    temperature of its probabilities, and `predict --agree` its threshold (docs/using.md). 0: neither."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the other texts that is not learnt from; the weights that agree best with its targets (mean KL) are kept; 0: the last."""
    evaluate_every: PositiveInt = 10
    """Steps between two validations."""
    patience: PositiveInt | None = None
    """Validations without an improvement after which training stops early; null: it runs through all steps."""

    @model_validator(mode="after")
    def _targets_are_needed(self) -> Self:
        if self.learn_from == DEMONSTRATIONS_FILE:
            for key in ("loss", "ce_weight", "validation_fraction", "auxiliary", "ce_target"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"`{key}` is about targets, and learn_from is {self.learn_from}; leave it out, or name a target set")
        elif self.tuning == "contrastive":
            raise ValueError(f"`tuning: contrastive` is for gold labels, and learn_from is {self.learn_from}; use {DEMONSTRATIONS_FILE}")
        if not self.holds_back and self.held_back not in {0.0, type(self).model_fields["held_back"].default}:
            raise ValueError(f"`held_back` is for students of a target set or a round, and learn_from is {self.learn_from}; leave it out")
        if self.temperature != 1.0 and not self.learn_from.startswith("teachers/"):
            raise ValueError(f"`temperature` is for distributions from a cache, and learn_from is {self.learn_from}; leave it out")
        if self.class_weight and (self.learn_from.startswith("teachers/") or self.tuning == "contrastive"):
            raise ValueError(
                "`class_weight` is for losses over the labels; leave it out with `learn_from: teachers/…` or `tuning: contrastive`"
            )
        if self.ce_target == "targets" and not (self.ce_weight and self.holds_back):
            raise ValueError("`ce_target: targets` needs a `ce_weight` and a target set to learn from")
        if self.auxiliary and self.learn_from.startswith("rounds/"):
            raise ValueError(f"`auxiliary` is about teachers' caches, and learn_from is {self.learn_from}; leave it out")
        if self.ce_batch_size is not None and not (self.ce_weight and self.ce_target == "demonstrations"):
            raise ValueError("`ce_batch_size` is for a `ce_weight` on the demonstrations; leave it out, or set `ce_weight`")
        matched = [layer for term in self.auxiliary.values() if term.hidden_weight for _, layer in term.layers]
        if matched and (self.tuning == "head" or any(0 <= layer < self.freeze_layers for layer in matched)):
            raise ValueError("`auxiliary.*.hidden_weight` is about layers that are not learnt here; leave it out, or learn them")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: one occurs twice; each trains a student of its own")
        if self.patience is not None and not self.validation_fraction:
            raise ValueError("`patience` needs a validation part; set `validation_fraction`, for example to 0.1")
        return self

    @property
    def holds_back(self) -> bool:
        """Whether what it learns from are texts with targets, of which it can hold some back."""
        return self.learn_from.startswith(("targets/", "rounds/"))

    @property
    def runs(self) -> dict[str, "StudentParams"]:
        """Folder inside the student's → params of one training: "" for the first seed, `seeds/N` for the others."""
        seeds = self.seeds or (self.seed,)
        return {f"seeds/{seed}" if n else "": self.model_copy(update={"seed": seed, "seeds": None}) for n, seed in enumerate(seeds)}


SERVER_TOP = 20
"""Most probable tokens that a server is asked for: what OpenAI and vLLM give unless they are set otherwise."""
MONITOR_TESTS = 7
"""Tests that share `monitor.false_alarm_rate`: three of inputs, three of answers if there is a threshold, one of accuracy with labels."""


class BaselineParams(Frozen):
    """A way to do without a student."""

    prompts: str
    """`targets/NAME`: the teachers of a target set, with its calibration and weights. If answers are free text: `teachers/NAME`, the
    prompts of a teacher, or `models/NAME`, a model without a context."""
    contexts: Literal["each", "ensemble"]
    """Each context alone (mean, worst and best are reported), or all averaged as the target set says. Free text cannot be averaged."""

    @property
    def target_set(self) -> str:
        """The target set whose prompts these are; empty if answers are free text."""
        return self.prompts.removeprefix("targets/") if self.prompts.startswith("targets/") else ""


class EvaluationParams(Frozen):
    """What every evaluation shares."""

    reference: str
    """The baseline that agreement is reported with: the teacher."""
    bootstrap: PositiveInt = 2000
    """Resamples behind each 95 % interval."""
    seed: int = 0
    """Of the resampling."""
    cost_examples: PositiveInt = 4
    """Examples timed one by one for the cost table."""
    risk_examples: PositiveInt = 20
    """Examples of each evaluation set that a student answers again with something swapped, for each kind of swap."""


class SelectParams(Frozen):
    """Which student commands take if none is named: the one that the teacher expects to be right most often, by held-back texts."""

    within_ms: PositiveFloat | None = None
    """Milliseconds that a student may take for one text: the median on the machine that the stage `select` runs on. Null: no limit."""


class RuntimeParams(Frozen):
    """Settings that do not change results; no stage depends on them."""

    threads: PositiveInt | None = None
    """Threads of the matrix products; null: one for each core."""
    engine: Literal["local", "ray"] = "local"
    """Where teachers run: in the stage's process, or on the workers of Ray (docs/scale.md)."""
    workers: PositiveInt | None = None
    """Of Ray; null: one for each GPU, or one for each machine if there is no GPU."""

    @model_validator(mode="after")
    def _workers_are_ray_s(self) -> Self:
        if self.workers is not None and self.engine != "ray":
            raise ValueError(f"`workers` is for `engine: ray`, and the engine is {self.engine!r}; leave it out, or change the engine")
        return self


class MonitorParams(Frozen):
    """When `shotless monitor` says that retraining is due; no stage depends on it."""

    false_alarm_rate: Annotated[float, Field(gt=0, le=0.2)] = 0.01
    """Chance that inputs like the reference raise any alarm at all, over all tests together."""
    smallest_shift: Fraction = 0.1
    """Smaller shifts of length and confidence (gap of the distribution functions), label shares (total variation) or the answered share
    are no alarm."""
    smallest_vocabulary_share: Fraction = 0.001
    """The same for vocabulary: share of the variance that lies between reference and new inputs; small, since texts share few words."""
    smallest_embedding_share: Fraction = 0.01
    """The same for the last layer's state at the answer position."""
    max_rows: Annotated[int, Field(ge=50)] = 1000
    """Most rows of the reference, and of the new inputs; more are sampled."""
    permutations: Annotated[int, Field(ge=199)] = 1999
    """Behind each test's p-value."""
    accuracy_drop: Fraction = 0.05
    """With labels: how far accuracy may lie under the student's own out-of-domain accuracy in `metrics/eval`."""
    min_accuracy: Fraction | None = None
    """With labels: a fixed bound instead."""
    max_memory_mb: PositiveInt | None = None
    """Peak memory of the process that answers; null: no limit."""
    seed: int = 0
    """Of draws and permutations."""

    @model_validator(mode="after")
    def _enough_permutations(self) -> Self:
        needed = math.ceil(MONITOR_TESTS / self.false_alarm_rate) - 1
        if self.permutations < needed:
            reach = f"cannot reach a false_alarm_rate of {self.false_alarm_rate} over {MONITOR_TESTS} tests"
            raise ValueError(f"permutations {self.permutations} {reach}; set {needed} or more")
        return self


class Params(Frozen):
    """All of params.yaml."""

    task: TaskParams
    downloads: dict[Name, Download] = Field(default={})
    models: dict[Name, ModelParams] = Field(min_length=1)
    servers: dict[Name, ServerParams] = Field(default={})
    data: DataParams
    contexts: dict[Name, ContextParams] = Field(default={})
    tuned: dict[Name, TunedParams] = Field(default={})
    teachers: dict[Name, TeacherParams] = Field(default={})
    targets: dict[Name, TargetParams] = Field(default={})
    rounds: dict[Name, RoundParams] = Field(default={})
    students: dict[Name, StudentParams] = Field(default={})
    baselines: dict[Name, BaselineParams]
    evaluation: EvaluationParams
    select: SelectParams = SelectParams()
    runtime: RuntimeParams = RuntimeParams()
    monitor: MonitorParams = MonitorParams()

    @model_validator(mode="after")
    def _check(self) -> Self:
        checks = (
            self._names,
            self._servers,
            self._roles,
            self._labels,
            self._targets,
            self._rounds,
            self._learning,
            self._baselines,
            self._order,
        )
        if faults := [fault for check in checks for fault in check()]:
            raise ValueError("\n".join(faults))
        return self

    @property
    def summary(self) -> str:
        """How many of each a run makes, in a line."""
        blocks = ("teachers", "targets", *(["rounds"] if self.rounds else []), "students", "baselines")
        return ", ".join(f"{len(getattr(self, block))} {block}" for block in blocks)

    def folders(self) -> set[str]:
        """Every model folder that a run has, as its path under artifacts/."""
        maps = {"models": self.models, "tuned": self.tuned, "students": self.students}
        return {f"{kind}/{name}" for kind, entries in maps.items() for name in entries}

    def base_model(self, folder: str) -> str:
        """The name in `models` whose tokenizer a model folder or server has: of what it was made from; empty if a server gets text."""
        kind, _, name = folder.partition("/")
        while kind not in {"models", ""}:
            base = {"tuned": self.tuned, "students": self.students, "servers": self.servers}[kind][name]
            kind, _, name = (base.prompt_tokenizer if isinstance(base, ServerParams) else base.base).partition("/")
        return name

    def kept_of(self, teacher: str) -> CacheParams:
        """What is kept of a teacher's distributions: as its `cache` says, as far as a server gives it."""
        cache = self.teachers[teacher].cache
        if not self.teachers[teacher].model.startswith("servers/"):
            return cache
        return cache.model_copy(update={"encoding": "top_k_tail", "top_k": min(cache.top_k, SERVER_TOP)})

    def format_of(self, folder: str) -> Format:
        """How a model folder is asked without a context: as it was trained."""
        kind, _, name = folder.partition("/")
        return self.tuned[name].format if kind == "tuned" else self.students[name].format if kind == "students" else "plain"

    @property
    def asks_plain_text(self) -> bool:
        """Whether any model is asked in plain text, not in chat turns."""
        formats = {self.contexts[teacher.contexts].format for teacher in self.teachers.values()}
        formats |= {entry.format for entry in [*self.tuned.values(), *self.students.values()]}
        formats |= {self.format_of(entry.prompts) for entry in self.baselines.values() if entry.prompts in self.folders()}
        return "plain" in formats

    def context_models(self) -> dict[str, list[list[str]]]:
        """Context → pairs of a name in `models` whose tokenizer it is put to, and a format: the teachers that use it.

        Under '': those without a context alone.
        """
        used: dict[str, set[tuple[str, str]]] = {name: set() for name in self.contexts}
        for teacher in self.teachers.values():
            if model := self.base_model(teacher.model):
                used[teacher.contexts].add((model, self.contexts[teacher.contexts].format))
        alone = {(self.base_model(entry.base), entry.format) for entry in [*self.tuned.values(), *self.students.values()]}
        asked = self.folders().intersection(entry.prompts for entry in self.baselines.values())
        alone |= {(self.base_model(folder), self.format_of(folder)) for folder in asked}
        return {name: sorted(map(list, pairs)) for name, pairs in {**used, "": alone.difference(*used.values())}.items()}

    def _is_judged(self, teacher: str) -> bool:
        """Whether a teacher can answer labelled examples that it has not seen: no student, and no tuned model that is shown some."""
        kind, contexts = self.teachers[teacher].model.partition("/")[0], self.contexts.get(self.teachers[teacher].contexts)
        return kind in {"models", "servers"} or (kind == "tuned" and contexts is not None and not contexts.demonstrations)

    def _names(self) -> Iterator[str]:
        paths = {f"models.{name}.path": model.path for name, model in self.models.items()}
        paths |= {f"data.sources.{name}.path": source.path for name, source in self.data.sources.items()}
        for where, path in paths.items():
            if path.startswith(f"{DOWNLOADS}/"):
                yield from _known(where, path.split("/")[1], self.downloads)
        folders = self.folders()
        for name, tuned in self.tuned.items():
            yield from _known(f"tuned.{name}.base", tuned.base, folders)
        for name, teacher in self.teachers.items():
            yield from _known(f"teachers.{name}.model", teacher.model, folders | {f"servers/{server}" for server in self.servers})
            yield from _known(f"teachers.{name}.contexts", teacher.contexts, self.contexts)
            if teacher.contexts in self.contexts and teacher.model in folders:
                yield from self._formats(f"teachers.{name}", teacher, self.contexts[teacher.contexts].format)
        for name, student in self.students.items():
            yield from _known(f"students.{name}.base", student.base, folders)
            if name in self.baselines:
                yield f"students.{name}, baselines.{name}: a student and a baseline of the same name; rename one"

    def _servers(self) -> Iterator[str]:
        for name, server in self.servers.items():
            if server.tokenizer is not None:
                yield from _known(f"servers.{name}.tokenizer", server.tokenizer, {f"models/{model}" for model in self.models})
        for name, teacher in self.teachers.items():
            kind, _, server = teacher.model.partition("/")
            if kind != "servers":
                continue
            if self.task.completion is not None and self.task.completion.source == "given":
                yield f"teachers.{name}.model: {teacher.model!r}, and a server writes its own; use a local model, or `source: generated`"
            if teacher.scores == "input_tokens":
                yield f"teachers.{name}.scores: `input_tokens`, and a server gives distributions of its answer alone; use a local model"
            if teacher.cache.temperatures or teacher.cache.hidden_layers:
                yield f"teachers.{name}.cache: a server gives neither hidden states nor what other temperatures need; leave both out"
            if teacher.dtype != "auto":
                yield f"teachers.{name}.dtype: {teacher.dtype!r}, and the number format is the server's matter; leave it out"
            if self.task.completion is not None:
                if server in self.servers and self.servers[server].tokenizer is None:
                    named = "this model's, or that of the students with `sends: text`"
                    yield f"servers.{server}.tokenizer: null, and free text is learnt in token ids; name {named}"
            elif server in self.servers and not self.servers[server].prompt_tokenizer:
                learning = [f"students.{one}.learn_from" for one, own in self.students.items() if own.learn_from == f"teachers/{name}"]
                learning += [f"targets.{one}.auxiliary_caches" for one, own in self.targets.items() if name in own.auxiliary_caches]
                why = f"is behind servers.{server}, which tokenises for itself, so that its distributions are not kept"
                for where in learning:
                    yield f"{where}: teacher {name!r} {why}; let servers.{server} send the ids of a `tokenizer`, or learn from a target set"

    def _formats(self, where: str, teacher: TeacherParams, asked: Format) -> Iterator[str]:
        if asked == "chat" and teacher.scores == "input_tokens":
            yield f"{where}.contexts: {teacher.contexts!r} is `format: chat`, and `scores: input_tokens` reads plain text; name others"
        if not teacher.model.startswith("models/") and (trained := self.format_of(teacher.model)) != asked:
            asks = f"{teacher.contexts!r} is `format: {asked}`"
            yield f"{where}.contexts: {asks}, and {teacher.model} learns in `{trained}`; give both the same"

    def _roles(self) -> Iterator[str]:
        sources, transfer, pool = self.data.sources, self.data.transfer, self.data.pool
        unlabelled = {"transfer": transfer} | ({"pool": pool} if pool is not None else {})
        roles = {"demonstrations": self.data.demonstrations.source} | {role: entry.source for role, entry in unlabelled.items()}
        roles |= {f"evaluation.{name}": entry.source for name, entry in self.data.evaluation.items()}
        for role, source in roles.items():
            yield from _known(f"data.{role}.source", source, sources)
            if source in sources and role not in unlabelled and sources[source].label is None and self.task.labels:
                yield f"data.{role}: source {source!r} has no labels (`label: null`), and this role needs them"
        for role, entry in {"demonstrations": self.data.demonstrations, **unlabelled}.items():
            for source in entry.extra_sources:
                yield from _known(f"data.{role}.extra_sources", source, sources)
                if source == entry.source:
                    limit = "limit" if role in unlabelled else "per_label"
                    yield f"data.{role}.extra_sources: {source!r} is data.{role}.source itself; set its `{limit}`"
                if role not in unlabelled and source in sources and sources[source].label is None and self.task.labels:
                    yield f"data.{role}.extra_sources: {source!r} has no labels (`label: null`), and this role needs them"
        for source in self.data.never_held_back:
            yield from _known("data.never_held_back", source, sources)
        if not transfer.limits.keys() - set(self.data.never_held_back):
            yield "data.never_held_back: it names every source of data.transfer, and students could hold nothing back; leave one out"
        for source in pool.limits if pool is not None else ():
            if transfer.limits.get(source, 0) is None:
                yield f"data.pool: data.transfer takes all texts of {source!r}, and none is left; set a limit there"
        if self.task.completion is not None:
            needs = list(transfer.limits) if self.task.completion.source == "given" else []
            needs += [roles["demonstrations"]] if any(context.demonstrations for context in self.contexts.values()) else []
            for source in dict.fromkeys(needs):
                if source in sources and sources[source].completion is None:
                    yield f"data.sources.{source}.completion: not set, and a role takes its answers from this source"
        held = self.data.demonstrations.per_label * max(1, len(self.task.labels))
        for name, context in self.contexts.items():
            if context.demonstrations > held:
                asked = f"contexts.{name}.demonstrations: {context.demonstrations} asked for"
                yield f"{asked}, and data.demonstrations.per_label draws only {held}; lower the one or raise the other"

    def _labels(self) -> Iterator[str]:
        free = self.task.completion is not None
        for name, source in self.data.sources.items():
            for field in source.fields or {}:
                yield from _known(f"data.sources.{name}.fields", field, self.task.fields)
            rule = source.label
            produced = set() if rule is None else {value for value in (rule.values or {}).values() if value}
            if rule is not None and rule.threshold is not None:
                produced = {rule.positive, rule.negative}
            if (unknown := produced - set(self.task.labels)) and (self.task.labels or not free):
                where = "task.completion.form" if free else "task.verbalisers"
                yield f"data.sources.{name}.label: {choices(unknown)} has no verbaliser; {where} has {choices(self.task.labels)}"

    def _targets(self) -> Iterator[str]:
        answering = {name for name, teacher in self.teachers.items() if teacher.scores == "answers"}
        for name, target in self.targets.items():
            if self.task.completion is not None:
                yield f"targets.{name}: answers are free text, which has no target set; leave it out (students learn from teachers/NAME)"
                continue
            for teacher in target.teachers:
                yield from _known(f"targets.{name}.teachers", teacher, answering)
                if target.is_learned and teacher in answering and not self._is_judged(teacher):
                    learnt = f"{self.teachers[teacher].model!r} of teacher {teacher!r} has learnt them"
                    yield f"targets.{name}: labelled examples are to judge its teachers, and {learnt}; leave `learned` out, or the teacher"
            if isinstance(target.prior, dict) and set(target.prior) != set(self.task.labels):
                yield f"targets.{name}.prior: shares of {choices(target.prior)}; give each label one: {choices(self.task.labels)}"
            for teacher in target.auxiliary_caches:
                yield from _known(f"targets.{name}.auxiliary_caches", teacher, self.teachers)

    def _rounds(self) -> Iterator[str]:
        for name, entry in self.rounds.items():
            yield from _known(f"rounds.{name}.student", entry.student, self.students)
            if self.task.completion is not None:
                yield f"rounds.{name}: answers are free text, which has no probabilities to learn; leave it out"
            elif self.data.pool is None:
                yield f"rounds.{name}: no texts for {entry.student!r} to answer; set `data.pool`, with the keys of `data.transfer`"
        if self.data.pool is not None and not self.rounds:
            yield "data.pool: no student answers it; leave it out, or add `rounds: {NAME: {student: NAME}}`"

    def _learning(self) -> Iterator[str]:
        maps = {"targets": self.targets, "rounds": self.rounds, "teachers": self.teachers}
        learnable = {f"{kind}/{name}" for kind, entries in maps.items() for name in entries} | {DEMONSTRATIONS_FILE}
        for name, student in self.students.items():
            where = f"students.{name}"
            if student.learn_from in self.folders() and student.learn_from.startswith("students/"):
                teaching = f"rounds: {{second: {{student: {student.learn_from.partition('/')[2]}}}}}"
                yield f"{where}.learn_from: a student teaches through a round; write `rounds/second`, and `{teaching}`"
                continue
            if student.learn_from not in learnable:
                yield from _known(f"{where}.learn_from", student.learn_from, learnable)
                continue
            kind, _, source = student.learn_from.partition("/")
            if self.task.completion is not None and kind != "teachers":
                yield f"{where}.learn_from: {student.learn_from!r}, and answers are free text; learn from teachers/NAME"
            if self.task.completion is not None and student.ce_weight and student.ce_target == "demonstrations":
                yield f"{where}.ce_weight: answers are free text, and demonstrations have no labels to learn; leave it out"
            if kind == "teachers":
                if student.loss == "hard":
                    yield f"{where}.loss: `hard` learns a target set's most probable label, and learn_from is {student.learn_from!r}"
                else:
                    own = AuxiliaryParams(loss=student.loss, temperature=student.temperature)
                    yield from _cache_faults(where, own, self.teachers[source].cache)
            learnt = {f"{where}.auxiliary.{teacher}": teacher for teacher in student.auxiliary}
            learnt |= {f"{where}.learn_from": source} if kind == "teachers" else {}
            for place, teacher in learnt.items():
                own = self.teachers.get(teacher)
                context = None if own is None or own.scores == "input_tokens" else self.contexts.get(own.contexts)
                if context is not None and context.format != student.format:
                    theirs = f"{teacher!r} answers in `format: {context.format}`, and the student in `{student.format}`"
                    yield f"{place}: {theirs}, whose answers have other tokens; give both the same, or learn from a target set"
            beside = self.targets[source].auxiliary_caches if kind == "targets" else (source,) if kind == "teachers" else ()
            for teacher, term in student.auxiliary.items():
                yield from _known(f"{where}.auxiliary", teacher, beside)
                if teacher in self.teachers:
                    yield from _cache_faults(f"{where}.auxiliary.{teacher}", term, self.teachers[teacher].cache)

    def _baselines(self) -> Iterator[str]:
        free = self.task.completion is not None
        answering = {f"teachers/{name}" for name, teacher in self.teachers.items() if teacher.scores == "answers"}
        prompts = answering | self.folders() if free else {f"targets/{name}" for name in self.targets}
        for name, baseline in self.baselines.items():
            yield from _known(f"baselines.{name}.prompts", baseline.prompts, prompts)
            if free and baseline.contexts == "ensemble":
                yield f"baselines.{name}.contexts: answers are free text, which cannot be averaged; use `each`"
            if free or baseline.target_set not in self.targets or baseline.contexts != "each":
                continue
            asked = [self.teachers[one].contexts for one in self.targets[baseline.target_set].teachers if one in self.teachers]
            if twice := {context for context in asked if asked.count(context) > 1}:
                shared = f"teachers of {baseline.prompts!r} share the contexts {choices(twice)}, so predictions could not be told apart"
                yield f"baselines.{name}.contexts: `each`, and {shared}; use `ensemble`, or a target set for each teacher"
        reference = self.evaluation.reference
        yield from _known("evaluation.reference", reference, self.baselines)
        if not free and reference in self.baselines and self.baselines[reference].contexts == "each":
            why = "answers once for each context, so agreement with it is not defined"
            yield f"evaluation.reference: {reference!r} {why}; choose a baseline with `contexts: ensemble`"

    def _order(self) -> Iterator[str]:
        """A circle of entries that wait for each other. As in dvc.yaml, a target set waits for all teachers."""
        waits = {f"tuned/{name}": {tuned.base} for name, tuned in self.tuned.items()}
        waits |= {f"teachers/{name}": {teacher.model} for name, teacher in self.teachers.items()}
        waits |= {f"targets/{name}": {f"teachers/{teacher}" for teacher in self.teachers} for name in self.targets}
        waits |= {f"rounds/{name}": {f"students/{entry.student}"} for name, entry in self.rounds.items()}
        waits |= {f"students/{name}": {student.base, student.learn_from} for name, student in self.students.items()}
        try:
            TopologicalSorter(waits).prepare()
        except CycleError as error:
            circle = [folder.replace("/", ".") for folder in error.args[1][:-1]]
            start = circle.index(min(circle))
            yield (
                f"{', '.join([*circle[start:], *circle[: start + 1]])}: each of them waits for the next (a target set waits for all "
                "teachers). A student teaches others through a round: `rounds: {second: {student: NAME}}`, and `learn_from: rounds/second` "
                "in the others"
            )


def _cache_faults(where: str, term: AuxiliaryParams, cache: CacheParams) -> Iterator[str]:
    """What a loss asks of a cache that the cache will not hold."""
    if term.temperature not in {1.0, *cache.temperatures}:
        held = choices(cache.temperatures)
        yield f"{where}.temperature: {term.temperature:g}, and the teacher's cache.temperatures has {held}; add it there"
    if term.weight and term.loss == "reverse_kl" and cache.encoding == "top_k":
        yield f"{where}.loss: `reverse_kl` needs the tail's mass, and the teacher's cache.encoding is `top_k`; use `top_k_tail` or `hybrid`"
    kept = {layer for layer, _ in term.layers} if term.hidden_weight else set()
    if lacking := kept - set(cache.hidden_layers):
        yield f"{where}.layers: the teacher's cache.hidden_layers lacks {choices(lacking)}; it has {choices(cache.hidden_layers)}"


def _known(where: str, name: str, names: Collection[str]) -> Iterator[str]:
    if name not in names:
        yield f"{where}: no {name!r}; choose one of: {choices(names)}"
