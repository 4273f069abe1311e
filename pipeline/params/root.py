"""All of params.yaml, and whether its names point somewhere."""

from typing import Self

from pydantic import Field, model_validator

from pipeline.errors import choices
from pipeline.params.base import DEMONSTRATIONS_FILE, Frozen, Name
from pipeline.params.data import ContextParams, DataParams, Origin
from pipeline.params.evaluation import BaselineParams, EvaluationParams, MonitorParams, RuntimeParams
from pipeline.params.order import check_order
from pipeline.params.task import TaskParams
from pipeline.params.teaching import TargetParams, TeacherParams
from pipeline.params.training import StudentParams, TunedTeacherParams


class Params(Frozen):
    """All of params.yaml."""

    task: TaskParams
    models: dict[Name, Origin] = Field(min_length=1)
    data: DataParams
    contexts: dict[Name, ContextParams]
    tunings: dict[Name, TunedTeacherParams] = Field(default={})
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
        for source in self.data.transfer.beside:
            _known("data.transfer.beside", source, sources)
            if source == self.data.transfer.source:
                raise ValueError(f"data.transfer.beside: {source!r} is data.transfer.source itself; set its `limit`")
        completion = self.task.completion
        if completion is not None:
            needs = {"transfer"} if completion.source == "given" else set()
            needs |= {"demonstrations"} if any(context.demonstrations for context in self.contexts.values()) else set()
            for role in sorted(needs):
                drawn = self.data.transfer.limits if role == "transfer" else (roles[role].source,)
                if lacking := [source for source in drawn if sources[source].completion is None]:
                    raise ValueError(f"data.sources.{lacking[0]}.completion: not set, and data.{role} takes its answers from it")
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
        answering = {name for name, teacher in self.teachers.items() if teacher.reads == "answers"}
        for name, target in self.targets.items():
            for teacher_name in target.teachers:
                _known(f"targets.{name}.teachers", teacher_name, answering)
            for source in target.sources or ():
                _known(f"targets.{name}.sources", source, self.data.transfer.limits)
            for teacher_name in target.caches:
                _known(f"targets.{name}.caches", teacher_name, self.teachers)
        learnable = {f"targets/{n}" for n in self.targets} | {f"scores/{n}" for n in self.teachers} | {DEMONSTRATIONS_FILE}
        for name, student in self.students.items():
            _known(f"students.{name}.base", student.base, folders)
            _known(f"students.{name}.learn_from", student.learn_from, learnable)
            kind, _, source = student.learn_from.partition("/")
            beside = self.targets[source].caches if kind == "targets" else (source,)
            for teacher_name in student.also:
                _known(f"students.{name}.also", teacher_name, beside)
        for name, baseline in self.baselines.items():
            free = completion is not None
            prompts = {f"scores/{n}" for n in answering} | folders if free else {f"targets/{n}" for n in self.targets}
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
        check_order(self.tunings, self.teachers, self.targets, self.students)
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
