"""Training a student or a tuned teacher: from the files of earlier stages to its folder and its metrics.

Everything is checked before training. One run at a time trains for a folder. The folder's manifest is written last, and the checkpoint is
removed after it. All files but those in metrics/runtime depend on params and data alone, so that equal runs give equal bytes.
"""

import csv
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.errors import MismatchError, UsageError
from pipeline.files import MANIFEST, Folders, one_writer, read_json, sha256_file, sha256_json, sha256_text, write_json, write_manifest, write_text
from pipeline.models.folders import (
    check_folder,
    context_limit,
    cut_layers,
    load_model,
    load_tokenizer,
    parameter_counts,
    parse_layers,
    save_model,
    tokenizer_sha256,
    weights_sha256,
)
from pipeline.models.machine import default_device, peak_rss_bytes, use_machine
from pipeline.models.trained import about_trained
from pipeline.params import DEMONSTRATIONS_FILE, Params, StudentParams, TuningParams, pick
from pipeline.progress import rate
from pipeline.schema import Example, read_examples
from pipeline.students.auxiliary import CacheTerm, TeacherCache
from pipeline.students.checkpoint import SECONDS_BETWEEN, Checkpoint
from pipeline.students.data import LabelTerm, StudentRow, demonstrations, target_set, validation_part
from pipeline.students.loop import Outcome, Validation, train
from pipeline.students.processes import ALONE, Processes
from pipeline.students.tuning import learning_rate
from pipeline.task import Task, TaskTokens

TRAINING_VERSION = 3
"""Raised when the training's numbers change: a checkpoint of another version is not used."""
CACHES = "caches.json"
"""In a target set: which auxiliary caches belong to it, by the hash of their manifest."""


def train_student(
    name: str, params: Params, folders: Folders, processes: Processes = ALONE, checkpoint_seconds: float = SECONDS_BETWEEN
) -> None:
    """Write artifacts/students/NAME, metrics/train/NAME.json, metrics/curves/NAME.csv and metrics/runtime/student-NAME.json.

    One training for each seed: the first in the folder, the others in its `seeds/`. Of several `processes` each calls this, and the first
    one writes. `checkpoint_seconds` are the least between two checkpoints. Raises UsageError and MismatchError on bad input before
    training, ShotlessError if it diverges.
    """
    student = pick("students", params.students, name)
    job = _student_job(name, student, _tokens(folders, student.base, params), folders)
    _train(job, student.runs, params.runtime.threads, folders, processes, checkpoint_seconds)


def tune_teacher(name: str, params: Params, folders: Folders, checkpoint_seconds: float = SECONDS_BETWEEN) -> None:
    """Fine-tune a teacher's model on the demonstrations' labels, with no layer cut.

    Writes artifacts/tuned/NAME, metrics/train/tuned-NAME.json, metrics/curves/tuned-NAME.csv and metrics/runtime/tuned-NAME.json.
    """
    tuned = pick("tuned", params.tuned, name)
    file = folders.artifacts / DEMONSTRATIONS_FILE
    tokens = _tokens(folders, tuned.base, params)
    terms = [LabelTerm("cross_entropy", 1.0, tuned.batch_size, demonstrations(file, tokens))]
    job = _Job("tuned", name, tuned, tuned.base, None, DEMONSTRATIONS_FILE, {"demonstrations": sha256_file(file)}, tokens, terms, [], None)
    _train(job, {"": tuned}, params.runtime.threads, folders, ALONE, checkpoint_seconds)


@dataclass(frozen=True)
class _Job:
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
    label_terms: list[LabelTerm]
    cache_terms: list[CacheTerm]
    validation: Validation | None

    @property
    def metrics_name(self) -> str:
        """The name of its files in metrics/."""
        return self.name if self.kind == "student" else f"tuned-{self.name}"

    def provenance(self, base: Path) -> dict[str, Any]:
        """Where the weights come from, by content: no clock and no machine."""
        return {
            "kind": self.kind,
            "base": self.base,
            "base_weights_sha256": weights_sha256(base),
            "base_tokenizer_sha256": tokenizer_sha256(base),
            "layers": self.layers,
            "learn_from": self.learn_from,
            "sources_sha256": dict(self.sources),
            "params": self.params.model_dump(mode="json"),
            "training_version": TRAINING_VERSION,
        }

    def check_lengths(self, base: Path) -> None:
        """Raise UsageError if a row with its answer is longer than the model takes."""
        branch = max(map(len, self.tokens.completions), default=1) - 1
        lengths = [(row.tokens + branch, row.example_id) for term in self.label_terms for row in term.rows]
        lengths += [(row.tokens, row.example_id) for term in self.cache_terms for row in term.rows]
        longest, example_id = max(lengths)
        limit = context_limit(base)
        if limit is not None and longest > limit:
            raise UsageError(
                f"example {example_id} has {longest} tokens with its answer, and {base} takes {limit}. Lower `task.max_chars`, so that longer "
                "inputs are quarantined."
            )


def _student_job(name: str, student: StudentParams, tokens: TaskTokens, folders: Folders) -> _Job:
    """What a student learns, checked; the same for all its seeds."""
    source, file = folders.artifacts / student.learn_from, folders.artifacts / DEMONSTRATIONS_FILE
    label_terms, cache_terms, sources = list[LabelTerm](), list[CacheTerm](), dict[str, str]()
    validation, learnt = None, None
    from_labels, from_targets = student.learn_from == DEMONSTRATIONS_FILE, student.learn_from.startswith("targets/")
    transfer = [] if from_labels else read_examples(folders.artifacts / "data" / "transfer.parquet", tokens.task.fields)

    def cache_of(folder: Path, temperature: float) -> TeacherCache:
        return TeacherCache(folder, folders.work, tokens, tokenizer_sha256(folders.artifacts / student.base), temperature)

    if from_targets:
        rows = target_set(source, transfer, tokens)
        learnt = [row.example_id for row in rows]
        if student.validation_fraction:
            held = validation_part(learnt, student.validation_fraction)
            validation = Validation([row for row, of_it in zip(rows, held, strict=True) if of_it], student.evaluate_every, student.patience)
            rows = [row for row, of_it in zip(rows, held, strict=True) if not of_it]
        on_labels = student.ce_weight if student.ce_target == "targets" else 0.0
        loss = "cross_entropy" if student.loss == "hard" else student.loss
        label_terms.append(LabelTerm(loss, 1.0, student.batch_size, rows, on_labels))
        sources |= {key: sha256_file(source / key) for key in ("targets.parquet", "calibration.json")}
    elif not from_labels:
        cache = cache_of(source, student.temperature)
        rows = cache.rows(transfer)
        if student.validation_fraction:
            held = validation_part([row.example_id for row in rows], student.validation_fraction)
            validation = Validation(rows.where(held), student.evaluate_every, student.patience)
            rows = rows.where(~held)
        assert student.loss != "hard"
        cache_terms.append(CacheTerm(student.loss, 1.0, student.batch_size, rows, cache))
        sources["cache"] = sha256_file(source / MANIFEST)
    for teacher, also in student.auxiliary.items():
        folder = folders.artifacts / "teachers" / teacher
        sources[f"auxiliary.{teacher}"] = _manifest_of(folder, source, f"students.{name}.auxiliary.{teacher}")
        cache = cache_of(folder, also.temperature)
        rows = cache.rows(transfer)
        rows = rows if learnt is None else rows.of_examples(learnt)
        if student.validation_fraction:
            rows = rows.where(~validation_part([row.example_id for row in rows], student.validation_fraction))
        size = also.batch_size or student.batch_size
        cache_terms.append(CacheTerm(also.loss, also.weight, size, rows, cache, also.hidden_weight, also.layers))
    if from_labels or (student.ce_weight and student.ce_target == "demonstrations"):
        size = student.batch_size if from_labels else student.ce_batch_size or max(1, student.batch_size // 4)
        label_terms.append(LabelTerm("cross_entropy", 1.0 if from_labels else student.ce_weight, size, demonstrations(file, tokens)))
        sources["demonstrations"] = sha256_file(file)
    return _Job(
        "student", name, student, student.base, student.layers, student.learn_from, sources, tokens, label_terms, cache_terms, validation
    )


def _manifest_of(folder: Path, learn_from: Path, where: str) -> str:
    """The hash of a cache's manifest. Raises MismatchError if the target set was made beside another cache of that name."""
    found = sha256_file(folder / MANIFEST)
    if learn_from.parent.name == "targets":
        wanted = read_json(learn_from / CACHES)[folder.name]["manifest_sha256"]
        if wanted != found:
            raise MismatchError(
                f"{where}: {learn_from} was made beside a cache with manifest {wanted[:12]}…, and {folder} has {found[:12]}…. "
                f"Run `dvc repro targets@{learn_from.name}`."
            )
    return found


def _tokens(folders: Folders, base: str, params: Params) -> TaskTokens:
    """The task in the tokens of a base."""
    check_folder(folders.artifacts / base)
    return TaskTokens(Task(params.task), load_tokenizer(folders.artifacts / base))


def _train(
    job: _Job,
    runs: Mapping[str, TuningParams],
    threads: int | None,
    folders: Folders,
    processes: Processes,
    checkpoint_seconds: float,
) -> None:
    """All trainings of a job, one run at a time, then its metrics."""
    output = folders.artifacts / ("students" if job.kind == "student" else "tuned") / job.name
    job.check_lengths(folders.artifacts / job.base)
    lock = folders.work / "training" / f"{sha256_text(str(output.resolve()))[:16]}.lock"
    with one_writer(lock) if processes.first else nullcontext():
        used = use_machine(processes.threads(threads))
        ran = {
            run.seed: _run(replace(job, params=run), output / place, len(runs) > 1, used, folders, processes, checkpoint_seconds)
            for place, run in runs.items()
        }
        if processes.first:
            _write_metrics(job, ran, used, folders.metrics)
            for one in ran.values():
                one.checkpoint.remove()


@dataclass(frozen=True)
class _Ran:
    """What one training left to be written down."""

    metrics: dict[str, Any]
    outcome: Outcome
    checkpoint: Checkpoint


def _run(
    job: _Job, output: Path, is_one_of_many: bool, threads: int, folders: Folders, processes: Processes, checkpoint_seconds: float
) -> _Ran:
    """Train with one seed and write its folder."""
    base, params = folders.artifacts / job.base, job.params
    provenance = job.provenance(base)
    about = about_trained(job.name, job.tokens, provenance)
    # others round otherwise
    round_alike = {"threads": threads, "processes": processes.count, "torch": torch.__version__, "transformers": transformers.__version__}
    own = f"{job.kind}-{job.name}" + (f"-seed{params.seed}" if is_one_of_many else "")
    checkpoint = Checkpoint(folders.work / "training", own, sha256_json([about, round_alike]), checkpoint_seconds, is_one_of_many)
    model = load_model(base, device=default_device())
    if job.layers is not None:
        cut_layers(model, parse_layers(job.layers, model.config.get_text_config().num_hidden_layers))
    if processes.first:
        (output / MANIFEST).unlink(missing_ok=True)
    outcome = train(
        model,
        job.tokens.completions,
        job.label_terms,
        params,
        title=f"{job.kind} {job.name}" + (f", seed {params.seed}" if is_one_of_many else ""),
        cache_terms=job.cache_terms,
        validation=job.validation,
        checkpoint=checkpoint,
        adapter=(output / "adapter", job.base) if params.adapters == "kept" else None,
        processes=processes,
    )
    counts = {
        "steps": len(outcome.reached.losses),
        "examples": outcome.examples,
        "tokens": outcome.tokens,
        "parameters": parameter_counts(model)[0],
        "trained_parameters": outcome.trained_parameters,
        "layers": int(model.config.get_text_config().num_hidden_layers),
    }
    choice = {}
    if job.validation is not None:
        validations = dict(outcome.reached.validations)
        choice = {
            "best_step": outcome.reached.best_step,
            "held_back_examples": len(job.validation.rows),
            "held_back_kl_nats": _significant(validations[outcome.reached.best_step]),
            "held_back_kl_nats_before": _significant(validations[0]),
        }
    if processes.first:
        model.config._name_or_path = ""
        output.mkdir(parents=True, exist_ok=True)
        save_model(model, load_tokenizer(base), output)
        names = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
        own_files = [name for name in names if not name.startswith("seeds/") and name != "README.md"]
        write_manifest(output, {**about, "counts": counts, **choice, "trains": outcome.trains, "forward": outcome.forward}, own_files)
    last = outcome.reached.losses[-max(1, len(outcome.reached.losses) // 10) :]
    return _Ran(counts | choice | {"final_loss": _significant(math.fsum(last) / len(last))}, outcome, checkpoint)


def _write_metrics(job: _Job, ran: Mapping[int, _Ran], threads: int, metrics: Path) -> None:
    """Metrics of the first seed, with each seed's loss and choice of step if there are several; the curve; what differs from run to run."""
    values: dict[str, Any] = {**next(iter(ran.values())).metrics, "base": job.base, "learn_from": job.learn_from}
    if len(ran) > 1:
        kept = ("steps", "final_loss", "best_step", "held_back_kl_nats")
        values["seeds"] = {str(seed): {key: one.metrics[key] for key in kept if key in one.metrics} for seed, one in ran.items()}
    write_json(values, metrics / "train" / f"{job.metrics_name}.json")
    write_text(_curve(job, {seed: one.outcome for seed, one in ran.items()}), metrics / "curves" / f"{job.metrics_name}.csv")
    outcomes = [one.outcome for one in ran.values()]
    seconds = sum(outcome.seconds for outcome in outcomes)
    runtime = {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(rate(sum(outcome.tokens_per_second * outcome.seconds for outcome in outcomes), seconds), 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": threads,
        "resumed_at_step": sum(outcome.resumed_at for outcome in outcomes),
    }
    write_json(runtime, metrics / "runtime" / f"{job.kind}-{job.name}.json")


def _curve(job: _Job, outcomes: Mapping[int, Outcome]) -> str:
    """A line for each step, counted from 1: the loss before its update in nats, the learning rate, and the mean KL of a validation after it.

    Of several seeds one follows the other.
    """
    validated, seeded = job.validation is not None, len(outcomes) > 1
    file = StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["step", "loss", "learning_rate", *(["held_back_kl"] if validated else []), *(["seed"] if seeded else [])])
    for seed, outcome in outcomes.items():
        kl = dict(outcome.reached.validations)
        for step, loss in enumerate(outcome.reached.losses, 1):
            found = [_significant(kl[step]) if step in kl else ""] if validated else []
            row = [step, _significant(loss), _significant(learning_rate(step - 1, job.params)), *found]
            writer.writerow([*row, *([seed] if seeded else [])])
    return file.getvalue()


def _significant(value: float) -> float:
    """A number rounded to six significant digits."""
    return float(f"{value:.6g}")
