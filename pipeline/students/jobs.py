"""What one training needs, from the files of earlier stages: what is learnt, what of it is held back, and what the outcome goes by.

A student and a tuned teacher differ in what they learn from and in whether layers are cut. Everything is checked here, before training:
labels, answers, targets and caches that belong to the task.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.folder import CACHES
from pipeline.errors import MismatchError, UsageError
from pipeline.files import read_sealed_json
from pipeline.files import sha256_file, sha256_json
from pipeline.models.identity import tokenizer_sha256, weights_sha256
from pipeline.models.loading import check_folder, load_tokenizer
from pipeline.params import DEMONSTRATIONS_FILE as DEMONSTRATIONS
from pipeline.params import AlsoParams, StudentParams, TunedTeacherParams, TuningParams
from pipeline.schema import TARGETS, read_table
from pipeline.students.batches import Example, Term
from pipeline.students.cached import CachedRow, CachedTeacher, CacheTerm
from pipeline.students.early_stopping import HeldBack, split
from pipeline.students.lessons import demonstrations, target_set, targets_fingerprint
from pipeline.task import Task, TaskTokens

TRAINING_VERSION = 2
"""Raised when the training's numbers change: a checkpoint of another version is not used."""


@dataclass(frozen=True)
class Places:
    """The folders that a run reads and writes."""

    artifacts: Path
    metrics: Path
    work: Path


@dataclass(frozen=True)
class Job:
    """A training, ready to run."""

    kind: str
    """`student` or `tuned`."""
    name: str
    params: TuningParams
    base: str
    layers: str | None
    learn_from: str
    sources: Mapping[str, str]
    """Hashes of what is learnt from."""
    tokens: TaskTokens
    terms: Sequence[Term]
    held_back: HeldBack | None = None
    cached: Sequence[CacheTerm] = ()

    @property
    def examples(self) -> list[Example]:
        """All of the labels' examples that the model reads."""
        return [e for term in self.terms for e in term.examples] + list(self.held_back.examples if self.held_back else ())

    @property
    def rows(self) -> list[CachedRow]:
        """All cached rows that it reads."""
        return [row for term in self.cached for row in term.examples] + list(self.held_back.cached if self.held_back else ())

    def provenance(self, base: Path) -> dict[str, Any]:
        """Where the weights come from that are trained on `base`, by content; no clock and no machine in it."""
        task = self.tokens.task
        completions = zip(task.params.verbalisers.items(), self.tokens.completions, strict=True)
        answers = task.params.completion
        return {
            "kind": self.kind,
            "name": self.name,
            "base": self.base,
            "base_weights_sha256": weights_sha256(base),
            "base_tokenizer_sha256": tokenizer_sha256(base),
            "layers": self.layers,
            "learn_from": self.learn_from,
            "sources_sha256": dict(self.sources),
            "template": task.params.template,
            "verbalisers": {label: {"text": text, "ids": list(ids)} for (label, text), ids in completions},
            "labels": list(task.labels),
            **({"completion": answers.model_dump(mode="json")} if answers is not None else {}),
            "params": self.params.model_dump(mode="json"),
            "training_version": TRAINING_VERSION,
        }

    def fingerprint(self, provenance: dict[str, Any], threads: int, processes: int) -> str:
        """What a checkpoint belongs to. Threads, processes, torch's version count: others round otherwise."""
        terms = [[term.loss, term.weight, term.label_weight, term.batch_size, len(term.examples)] for term in self.terms]
        terms += [[term.divergence, term.weight, term.batch_size, [row.example_id for row in term.examples]] for term in self.cached]
        belongs = {"provenance": provenance, "terms": terms, "threads": threads, "processes": processes, "torch": torch.__version__}
        digest = hashlib.sha256(sha256_json(belongs).encode())
        for example in self.examples:  # one by one: as one JSON text a million of them would take a gigabyte
            digest.update(sha256_json([example.example_id, example.ids, example.target]).encode())
        return digest.hexdigest()


def student_job(name: str, params: StudentParams, tokens: TaskTokens, places: Places) -> Job:
    """All that one seed's training needs, checked."""
    task = tokens.task
    from_labels = params.learn_from == DEMONSTRATIONS
    if from_labels and params.ce_weight:
        raise UsageError(
            f"students.{name}.ce_weight: {params.ce_weight} beside `learn_from: {DEMONSTRATIONS}`, where cross-entropy on the "
            "demonstrations is all there is; remove it, or learn from a target set."
        )
    if task.params.completion is not None and (params.ce_weight or not params.learn_from.startswith("scores/")):
        raise UsageError(
            f"students.{name}: learns from {params.learn_from} with ce_weight {params.ce_weight:g}, which are about labels, "
            "and this task's answers are free text; set `learn_from: scores/NAME` (a teacher) and leave `ce_weight` out."
        )
    terms, sources, held_back = [], {}, None
    cached: list[CacheTerm] = []
    if params.learn_from.startswith("scores/"):
        main, held_back = _cache_term(params, tokens, places)
        cached.append(main)
        sources["scores"] = main.source.fingerprint
    elif not from_labels:
        folder = places.artifacts / params.learn_from
        examples = target_set(folder, places.artifacts / "data" / "transfer.parquet", tokens)
        if params.held_back:
            examples, held = split(examples, params.held_back)
            held_back = HeldBack(held, params.evaluate_every, params.patience)
        on_targets = params.ce_weight if params.ce_on == "targets" else 0.0
        terms.append(Term("cross_entropy" if params.loss == "hard" else params.loss, 1.0, params.batch_size, examples, on_targets))
        sources |= targets_fingerprint(folder)
    for teacher, also in params.also.items():
        cached.append(_also_term(f"students.{name}.also.{teacher}", params, teacher, also, tokens, places))
        sources[f"also.{teacher}"] = sha256_json(cached[-1].source.manifest)
    if from_labels or (params.ce_weight and params.ce_on == "demonstrations"):
        file = places.artifacts / DEMONSTRATIONS
        weight, size = (1.0, params.batch_size) if from_labels else (params.ce_weight, demonstrations_a_step(params.batch_size))
        terms.append(Term("cross_entropy", weight, size, demonstrations(file, tokens)))
        sources["demonstrations"] = sha256_file(file)
    return Job("student", name, params, params.base, params.layers, params.learn_from, sources, tokens, terms, held_back, cached)


def tuned_job(name: str, params: TunedTeacherParams, tokens: TaskTokens, places: Places) -> Job:
    """All that a teacher's fine-tuning on the demonstrations' labels needs; no layer is cut."""
    file = places.artifacts / DEMONSTRATIONS
    terms = [Term("cross_entropy", 1.0, params.batch_size, demonstrations(file, tokens))]
    return Job("tuned", name, params, params.base, None, DEMONSTRATIONS, {"demonstrations": sha256_file(file)}, tokens, terms)


def tokens_of(base: Path, task: Task) -> TaskTokens:
    """The task in the tokens of a model folder, once that is checked."""
    check_folder(base)
    return TaskTokens(task, load_tokenizer(base))


def demonstrations_a_step(batch_size: int) -> int:
    """Demonstrations that a step takes beside its batch where `ce_weight` is set: a quarter as many, at least one.

    They are few and come round often; more of them would cost time and not say more.
    """
    return max(1, batch_size // 4)


def _cache_term(params: StudentParams, tokens: TaskTokens, places: Places) -> tuple[CacheTerm, HeldBack | None]:
    """What is learnt from a score cache, and what of it is held back."""
    base = places.artifacts / params.base
    teacher = CachedTeacher(places.artifacts / params.learn_from, places.work, tokens, tokenizer_sha256(base), params.temperature)
    rows, held_back = teacher.lessons(places.artifacts / "data" / "transfer.parquet", tokens), None
    if params.held_back:
        rows, held = split(rows, params.held_back)
        held_back = HeldBack((), params.evaluate_every, params.patience, held)
    if params.loss == "hard":
        raise UsageError("`loss: hard` is over the labels; with `learn_from: scores/NAME` use kl, reverse_kl or jensen_shannon.")
    return CacheTerm(params.loss, 1.0, params.batch_size, rows, teacher), held_back


def _also_term(where: str, params: StudentParams, teacher: str, also: AlsoParams, tokens: TaskTokens, places: Places) -> CacheTerm:
    """What is learnt of a further cache; what is held back of the transfer set, or not among the targets, is left out there too.

    Raises MismatchError where the cache is not the one that belonged to the target set.
    """
    folder = places.artifacts / "scores" / teacher
    source = CachedTeacher(folder, places.work, tokens, tokenizer_sha256(places.artifacts / params.base), also.temperature)
    if params.learn_from.startswith("targets/"):
        pointers = read_sealed_json(places.artifacts / params.learn_from / CACHES)
        wanted, found = pointers.get(teacher, {}).get("manifest_sha256"), sha256_json(source.manifest)
        if wanted != found:
            belongs = "belongs to no cache of that name" if wanted is None else f"was made beside a cache with manifest {wanted[:12]}"
            raise MismatchError(
                f"{where}: {params.learn_from} {belongs}, and {folder} has {found[:12]}; "
                f"run `dvc repro targets@{params.learn_from.removeprefix('targets/')}`."
            )
    rows = source.lessons(places.artifacts / "data" / "transfer.parquet", tokens)
    if params.learn_from.startswith("targets/"):
        targets = places.artifacts / params.learn_from / "targets.parquet"
        learnt = set(read_table(targets, TARGETS)["example_id"].to_pylist())
        rows = tuple(row for row in rows if row.example_id.rpartition(":")[2] in learnt)
    if params.held_back:
        rows, _ = split(rows, params.held_back)
    hidden = source.hidden_lesson(also.hidden_weight, also.layers, rows, where) if also.hidden_weight else None
    return CacheTerm(also.loss, also.weight, also.batch_size or params.batch_size, rows, source, hidden)
