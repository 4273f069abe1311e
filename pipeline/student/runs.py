"""A student or a tuned teacher, from the files of earlier stages to its folder.

The two differ in what they learn from and in whether layers are cut; the rest is one function. Everything is checked before
training: names, lengths, labels, targets that belong to the task.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel

from pipeline.cache.folder import CACHES
from pipeline.errors import MismatchError, UsageError
from pipeline.files import make_folder, read_sealed_json, write_json, write_sealed_json
from pipeline.hashing import sha256_file, sha256_json, sha256_text
from pipeline.models.identity import tokenizer_sha256, weights_sha256
from pipeline.models.loading import (
    check_folder,
    context_limit,
    load_model,
    load_tokenizer,
    parameter_counts,
    save_model,
)
from pipeline.models.machine import default_device, use_machine
from pipeline.models.provenance import FILE, identity_entries
from pipeline.models.truncation import cut_layers, parse_layers
from pipeline.params import DEMONSTRATIONS_FILE as DEMONSTRATIONS
from pipeline.params import AlsoParams, StudentParams, TunedTeacherParams, TuningParams
from pipeline.schema import TARGETS, read_table
from pipeline.student.batches import Example, Term
from pipeline.student.cached import CachedRow, CachedTeacher, CacheTerm
from pipeline.student.checkpoint import SECONDS_BETWEEN, Checkpoint
from pipeline.student.early_stopping import HeldBack, split
from pipeline.student.lessons import check_lengths, demonstrations, target_set, targets_fingerprint
from pipeline.student.outputs import final_loss, held_back_summary, write_curve, write_runtime
from pipeline.student.processes import Processes
from pipeline.student.training import ALONE, Trained, train
from pipeline.tasks import Task, TaskTokens

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


@dataclass(frozen=True)
class Ran:
    """What a training left to be written down."""

    job: Job
    values: dict[str, Any]
    trained: Trained
    threads: int
    checkpoint: Checkpoint


def train_student(
    name: str,
    params: StudentParams,
    task: Task,
    places: Places,
    threads: int | None = None,
    seconds_between: float = SECONDS_BETWEEN,
    processes: Processes = ALONE,
) -> None:
    """Write `artifacts/students/NAME`, `metrics/train/NAME.json`, `metrics/curves/NAME.csv`, `metrics/runtime/student-NAME.json`.

    One training for each of `params.runs`, all in that folder. `seconds_between` checkpoints. Of several `processes` each calls this, and
    the first one writes. Raises UsageError and MismatchError on bad input before training, ShotlessError where it diverges.
    """
    tokens = _tokens(places.artifacts / params.base, task)
    jobs = {place: _student_job(name, run, tokens, places) for place, run in params.runs.items()}
    output = places.artifacts / "students" / name
    with _one_run(output, places.work) if processes.first else nullcontext():
        ran = {
            job.params.seed: _run(job, output / place, places, threads, seconds_between, len(jobs) > 1, processes)
            for place, job in jobs.items()
        }
        if processes.first:
            _write_metrics(name, ran, places.metrics)


def _student_job(name: str, params: StudentParams, tokens: TaskTokens, places: Places) -> Job:
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


def tune_teacher(
    name: str, params: TunedTeacherParams, task: Task, places: Places, threads: int | None = None, seconds_between: float = SECONDS_BETWEEN
) -> None:
    """Fine-tune a teacher's model on the demonstrations' labels (PBFT), with no layer cut.

    Writes `artifacts/tuned/NAME`, `metrics/train/tuned-NAME.json`, `metrics/curves/tuned-NAME.csv`, `metrics/runtime/tuned-NAME.json`.
    """
    tokens = _tokens(places.artifacts / params.base, task)
    file = places.artifacts / DEMONSTRATIONS
    terms = [Term("cross_entropy", 1.0, params.batch_size, demonstrations(file, tokens))]
    job = Job("tuned", name, params, params.base, None, DEMONSTRATIONS, {"demonstrations": sha256_file(file)}, tokens, terms)
    output = places.artifacts / "tuned" / name
    with _one_run(output, places.work):
        ran = _run(job, output, places, threads, seconds_between)
        _write_metrics(f"tuned-{name}", {params.seed: ran}, places.metrics)


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


def demonstrations_a_step(batch_size: int) -> int:
    """Demonstrations that a step takes beside its batch where `ce_weight` is set: a quarter as many, at least one.

    They are few and come round often; more of them would cost time and not say more.
    """
    return max(1, batch_size // 4)


@contextmanager
def _one_run(output: Path, work: Path) -> Iterator[None]:
    """One run at a time trains for `output`: a second one waits, and then trains to the same bytes."""
    folder = work / "training"
    make_folder(folder)
    with FileLock(folder / f"{sha256_text(str(output.resolve()))[:16]}.lock"):
        yield


def _run(
    job: Job,
    output: Path,
    places: Places,
    threads: int | None,
    seconds_between: float,
    is_one_of_many: bool = False,
    processes: Processes = ALONE,
) -> Ran:
    """Train and write the folder. Of many trainings for one folder of DVC's, each keeps its end until all are done."""
    base = places.artifacts / job.base
    check_lengths(job.examples, job.rows, job.tokens, context_limit(base), base)
    used_threads = use_machine(processes.threads(threads))
    provenance = _provenance(job, base)
    own = f"{job.kind}-{job.name}" + (f"-seed{job.params.seed}" if is_one_of_many else "")
    fingerprint = _fingerprint(job, provenance, used_threads, processes.count)
    checkpoint = Checkpoint(places.work / "training", own, fingerprint, seconds_between, is_one_of_many)
    model = load_model(base, device=default_device())
    if job.layers is not None:
        cut_layers(model, parse_layers(job.layers, model.config.get_text_config().num_hidden_layers))
    adapter = (output / "adapter", job.base) if job.params.adapters == "kept" else None
    title = f"{job.kind} {job.name}" + (f", seed {job.params.seed}" if is_one_of_many else "")
    trained = train(
        model,
        job.tokens.completions,
        job.terms,
        job.params,
        title=title,
        cached=job.cached,
        checkpoint=checkpoint,
        held_back=job.held_back,
        adapter=adapter,
        processes=processes,
    )
    if processes.first:
        _write_model(model, base, output)
    counts = {
        "steps": len(trained.losses),
        "examples": trained.examples,
        "tokens": trained.tokens,
        "parameters": parameter_counts(model)[0],
        "trained_parameters": trained.trained_parameters,
        "layers": int(model.config.get_text_config().num_hidden_layers),
    }
    choice = held_back_summary(trained, len(job.held_back.examples) + len(job.held_back.cached)) if job.held_back else {}
    if processes.first:
        own = identity_entries(output, provenance)
        about = {**provenance, **own, "counts": counts, **choice, "trains": trained.trains, "forward": trained.forward}
        write_sealed_json(about, output / FILE)
    return Ran(job, counts | choice | {"final_loss": final_loss(trained.losses)}, trained, used_threads, checkpoint)


def _write_model(model: PreTrainedModel, base: Path, output: Path) -> None:
    make_folder(output)
    model.config._name_or_path = ""
    save_model(model, load_tokenizer(base), output)


def _write_metrics(name: str, ran: Mapping[int, Ran], metrics: Path) -> None:
    """Metrics of the first seed, with each seed's loss and choice of step where there are several; then no checkpoint is needed."""
    first = next(iter(ran.values()))
    values: dict[str, Any] = {**first.values, "base": first.job.base, "learn_from": first.job.learn_from}
    if len(ran) > 1:
        kept = ("steps", "final_loss", "best_step", "held_back_kl_nats")
        values["seeds"] = {str(seed): {key: run.values[key] for key in kept if key in run.values} for seed, run in ran.items()}
    write_json(values, metrics / "train" / f"{name}.json")
    write_curve({seed: run.trained for seed, run in ran.items()}, first.job.params, metrics / "curves" / f"{name}.csv")
    write_runtime([run.trained for run in ran.values()], first.threads, metrics / "runtime" / f"{first.job.kind}-{first.job.name}.json")
    for run in ran.values():
        run.checkpoint.remove()


def _tokens(base: Path, task: Task) -> TaskTokens:
    check_folder(base)
    return TaskTokens(task, load_tokenizer(base))


def _provenance(job: Job, base: Path) -> dict[str, Any]:
    """Where a folder's weights come from, by content; no clock and no machine in it."""
    task = job.tokens.task
    completions = zip(task.params.verbalisers.items(), job.tokens.completions, strict=True)
    answers = task.params.completion
    return {
        "kind": job.kind,
        "name": job.name,
        "base": job.base,
        "base_weights_sha256": weights_sha256(base),
        "base_tokenizer_sha256": tokenizer_sha256(base),
        "layers": job.layers,
        "learn_from": job.learn_from,
        "sources_sha256": dict(job.sources),
        "template": task.params.template,
        "verbalisers": {label: {"text": text, "ids": list(ids)} for (label, text), ids in completions},
        "labels": list(task.labels),
        **({"completion": answers.model_dump(mode="json")} if answers is not None else {}),
        "params": job.params.model_dump(mode="json"),
        "training_version": TRAINING_VERSION,
    }


def _fingerprint(job: Job, provenance: dict[str, Any], threads: int, processes: int) -> str:
    """What a checkpoint belongs to. Threads, processes, torch's version count: others round otherwise, and the end would be neither's."""
    terms = [[term.loss, term.weight, term.label_weight, term.batch_size, len(term.examples)] for term in job.terms]
    terms += [[term.divergence, term.weight, term.batch_size, [row.example_id for row in term.examples]] for term in job.cached]
    belongs = {"provenance": provenance, "terms": terms, "threads": threads, "processes": processes, "torch": torch.__version__}
    digest = hashlib.sha256(sha256_json(belongs).encode())
    for example in job.examples:  # one by one: as one JSON text a million of them would take a gigabyte
        digest.update(sha256_json([example.example_id, example.ids, example.target]).encode())
    return digest.hexdigest()
