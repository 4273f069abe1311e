"""All of params.yaml, and every combination in it that cannot work."""

from collections.abc import Container, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Self

from pydantic import Field, model_validator

from pipeline.errors import choices
from pipeline.params.data import DOWNLOADS, ContextParams, DataParams, Download, ModelParams
from pipeline.params.methods import (
    DEMONSTRATIONS_FILE,
    AuxiliaryParams,
    BaselineParams,
    CacheParams,
    EvaluationParams,
    MonitorParams,
    RuntimeParams,
    StudentParams,
    TargetParams,
    TeacherParams,
    TunedParams,
)
from pipeline.params.task import Frozen, Name, TaskParams

MAKERS = {"models": "models", "tuned": "tuned", "students": "students", "teachers": "teachers", "targets": "targets"}
"""First part of a path under artifacts/ → the map of params.yaml whose entry makes it."""


class CombinationError(ValueError):
    """Params that are right one by one and cannot work together; `faults` has a line for each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Params(Frozen):
    """All of params.yaml."""

    task: TaskParams
    downloads: dict[Name, Download] = Field(default={})
    models: dict[Name, ModelParams] = Field(min_length=1)
    data: DataParams
    contexts: dict[Name, ContextParams] = Field(default={})
    tuned: dict[Name, TunedParams] = Field(default={})
    teachers: dict[Name, TeacherParams] = Field(default={})
    targets: dict[Name, TargetParams] = Field(default={})
    students: dict[Name, StudentParams] = Field(default={})
    baselines: dict[Name, BaselineParams]
    evaluation: EvaluationParams
    runtime: RuntimeParams = RuntimeParams()
    monitor: MonitorParams = MonitorParams()

    @model_validator(mode="after")
    def _check(self) -> Self:
        checks = (self._files, self._roles, self._labels, self._folders, self._targets, self._learning, self._baselines, self._order)
        if faults := [fault for check in checks for fault in check()]:
            raise CombinationError(faults)
        return self

    @property
    def summary(self) -> str:
        """How many of each a run makes, in a line."""
        return ", ".join(f"{len(getattr(self, block))} {block}" for block in ("teachers", "targets", "students", "baselines"))

    @property
    def learnable(self) -> set[str]:
        """What a student may learn from."""
        return {f"targets/{name}" for name in self.targets} | {f"teachers/{name}" for name in self.teachers} | {DEMONSTRATIONS_FILE}

    def folders(self) -> set[str]:
        """Every model folder that a run has, as its path under artifacts/."""
        maps = {"models": self.models, "tuned": self.tuned, "students": self.students}
        return {f"{kind}/{name}" for kind, entries in maps.items() for name in entries}

    def base_model(self, folder: str) -> str:
        """The name in `models` of what a model folder was made from: its tokenizer is that model's."""
        kind, _, name = folder.partition("/")
        while kind != "models":
            base = self.tuned[name].base if kind == "tuned" else self.students[name].base
            kind, _, name = base.partition("/")
        return name

    def context_models(self) -> dict[str, list[str]]:
        """Context → names in `models` whose tokenizers it is put to: the teachers that use it. Under '': those without a context alone."""
        used: dict[str, set[str]] = {name: set() for name in self.contexts}
        for teacher in self.teachers.values():
            used[teacher.contexts].add(self.base_model(teacher.model))
        bases = {entry.base for entry in [*self.tuned.values(), *self.students.values()]}
        bases |= self.folders().intersection(entry.prompts for entry in self.baselines.values())
        alone = {self.base_model(folder) for folder in bases}.difference(*used.values())
        return {name: sorted(models) for name, models in {**used, "": alone}.items()}

    def _files(self) -> Iterator[str]:
        paths = {f"models.{name}.path": model.path for name, model in self.models.items()}
        paths |= {f"data.sources.{name}.path": source.path for name, source in self.data.sources.items()}
        for where, path in paths.items():
            first, _, rest = path.partition("/")
            if first == DOWNLOADS:
                yield from _known(where, rest.partition("/")[0], self.downloads)

    def _roles(self) -> Iterator[str]:
        sources, transfer = self.data.sources, self.data.transfer
        roles = {"demonstrations": self.data.demonstrations.source, "transfer": transfer.source}
        roles |= {f"evaluation.{name}": entry.source for name, entry in self.data.evaluation.items()}
        for role, source in roles.items():
            yield from _known(f"data.{role}.source", source, sources)
            if source in sources and role != "transfer" and sources[source].label is None and self.task.labels:
                yield f"data.{role}: source {source!r} has no labels (`label: null`), and this role needs them"
        for source in transfer.extra_sources:
            yield from _known("data.transfer.extra_sources", source, sources)
            if source == transfer.source:
                yield f"data.transfer.extra_sources: {source!r} is data.transfer.source itself; set its `limit`"
        if self.task.completion is not None:
            needs = list(transfer.limits) if self.task.completion.source == "given" else []
            needs += [roles["demonstrations"]] if any(context.demonstrations for context in self.contexts.values()) else []
            for source in dict.fromkeys(needs):
                if source in sources and sources[source].completion is None:
                    yield f"data.sources.{source}.completion: not set, and a role takes its answers from this source"
        held = self.data.demonstrations.per_label * max(1, len(self.task.labels))
        for name, context in self.contexts.items():
            if context.demonstrations > held:
                yield (
                    f"contexts.{name}.demonstrations: {context.demonstrations} asked for, and data.demonstrations.per_label draws only "
                    f"{held}; lower the one or raise the other"
                )

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

    def _folders(self) -> Iterator[str]:
        folders = self.folders()
        for name, tuned in self.tuned.items():
            yield from _known(f"tuned.{name}.base", tuned.base, folders)
        for name, teacher in self.teachers.items():
            yield from _known(f"teachers.{name}.model", teacher.model, folders)
            yield from _known(f"teachers.{name}.contexts", teacher.contexts, self.contexts)
        for name, student in self.students.items():
            yield from _known(f"students.{name}.base", student.base, folders)
        for name in sorted(set(self.students) & set(self.baselines)):
            yield f"students.{name}, baselines.{name}: a student and a baseline of the same name; rename one"

    def _targets(self) -> Iterator[str]:
        answering = {name for name, teacher in self.teachers.items() if teacher.scores == "answers"}
        for name, target in self.targets.items():
            if self.task.completion is not None:
                yield f"targets.{name}: answers are free text, which has no target set; leave it out (students learn from teachers/NAME)"
                continue
            for teacher in target.teachers:
                yield from _known(f"targets.{name}.teachers", teacher, answering)
            for teacher in target.auxiliary_caches:
                yield from _known(f"targets.{name}.auxiliary_caches", teacher, self.teachers)

    def _learning(self) -> Iterator[str]:
        for name, student in self.students.items():
            where = f"students.{name}"
            yield from _known(f"{where}.learn_from", student.learn_from, self.learnable)
            if student.learn_from not in self.learnable:
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
            members = [teacher for teacher in self.targets[baseline.target_set].teachers if teacher in self.teachers]
            asked = [self.teachers[teacher].contexts for teacher in members]
            if twice := {context for context in asked if asked.count(context) > 1}:
                yield (
                    f"baselines.{name}.contexts: `each`, and teachers of {baseline.prompts!r} share the contexts {choices(twice)}, so "
                    "predictions could not be told apart; use `ensemble`, or a target set for each teacher"
                )
        reference = self.evaluation.reference
        yield from _known("evaluation.reference", reference, self.baselines)
        if not free and reference in self.baselines and self.baselines[reference].contexts == "each":
            yield (
                f"evaluation.reference: {reference!r} answers once for each context, so agreement with it is not defined; choose a "
                "baseline with `contexts: ensemble`"
            )

    def _order(self) -> Iterator[str]:
        """A circle of entries that wait for each other. As in dvc.yaml, a target set waits for all teachers."""
        waits = {f"tuned.{name}": _makers(tuned.base) for name, tuned in self.tuned.items()}
        waits |= {f"teachers.{name}": _makers(teacher.model) for name, teacher in self.teachers.items()}
        waits |= {f"targets.{name}": {f"teachers.{teacher}" for teacher in self.teachers} for name in self.targets}
        waits |= {f"students.{name}": _makers(student.base, student.learn_from) for name, student in self.students.items()}
        try:
            TopologicalSorter(waits).prepare()
        except CycleError as error:
            circle = error.args[1][:-1]
            start = circle.index(min(circle))
            yield (
                f"{', '.join([*circle[start:], *circle[: start + 1]])}: each of them waits for the next (a target set waits for all "
                "teachers). If a student is to teach others, do that in a run of its own, with the first run's student as a model: "
                "`models: {first: {path: artifacts/students/NAME}}`"
            )


def _makers(*folders: str) -> set[str]:
    """The entries that make these folders."""
    named = [folder.split("/", 1) for folder in folders if "/" in folder]
    return {f"{MAKERS[kind]}.{name}" for kind, name in named if kind in MAKERS and kind != "models"}


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


def _known(where: str, name: str, names: Container[str] | Mapping[str, object]) -> Iterator[str]:
    if name not in names:
        yield f"{where}: no {name!r}; choose one of: {choices(names)}"  # type: ignore[arg-type]
