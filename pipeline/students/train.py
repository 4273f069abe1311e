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

import numpy as np
import torch
import transformers

from pipeline.cache.folder import CACHES, cache_manifest
from pipeline.errors import MismatchError, UsageError
from pipeline.files import (
    MANIFEST,
    Folders,
    one_writer,
    read_json,
    sha256_file,
    sha256_json,
    sha256_text,
    write_json,
    write_manifest,
    write_text,
)
from pipeline.models import folders as models
from pipeline.models.machine import default_device, peak_rss_bytes, use_machine
from pipeline.models.trained import about_trained
from pipeline.params import DEMONSTRATIONS_FILE, Params, StudentParams, TunedParams, pick
from pipeline.progress import rate
from pipeline.schema import read_examples
from pipeline.students.auxiliary import CacheTerm, TeacherCache
from pipeline.students.checkpoint import SECONDS_BETWEEN, Checkpoint
from pipeline.students.data import LabelTerm, demonstrations, target_set, validation_part
from pipeline.students.loop import Outcome, Validation, train
from pipeline.students.processes import ALONE, Processes
from pipeline.students.tuning import learning_rate
from pipeline.task import Task, TaskTokens

TRAINING_VERSION = 3
"""Raised when the training's numbers change: a checkpoint of another version is not used."""


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
    tuned, file = pick("tuned", params.tuned, name), folders.artifacts / DEMONSTRATIONS_FILE
    tokens = _tokens(folders, tuned.base, params)
    terms = [LabelTerm("cross_entropy", 1.0, tuned.batch_size, demonstrations(file, tokens))]
    job = _Job("tuned", name, tuned, DEMONSTRATIONS_FILE, tokens, {"demonstrations": sha256_file(file)}, terms, [], None)
    _train(job, {"": tuned}, params.runtime.threads, folders, ALONE, checkpoint_seconds)


@dataclass(frozen=True)
class _Job:
    """A training, ready to run."""

    kind: str
    """`student` or `tuned`."""
    name: str
    params: StudentParams | TunedParams
    learn_from: str
    tokens: TaskTokens
    sources: Mapping[str, str]
    """Hashes of what is learnt from."""
    label_terms: list[LabelTerm]
    cache_terms: list[CacheTerm]
    validation: Validation | None

    @property
    def layers(self) -> str | None:
        """The base's layers to keep; None: all."""
        return self.params.layers if isinstance(self.params, StudentParams) else None

    def about(self, base: Path) -> dict[str, Any]:
        """What the folder's manifest says of the weights' origin, by content: no clock and no machine."""
        provenance = {
            "kind": self.kind,
            "base": self.params.base,
            "base_weights_sha256": models.weights_sha256(base),
            "base_tokenizer_sha256": models.tokenizer_sha256(base),
            "layers": self.layers,
            "learn_from": self.learn_from,
            "sources_sha256": dict(self.sources),
            "params": self.params.model_dump(mode="json"),
            "training_version": TRAINING_VERSION,
        }
        return about_trained(self.name, self.tokens, provenance)


def _tokens(folders: Folders, base: str, params: Params) -> TaskTokens:
    """The task in the tokens of a base."""
    models.check_folder(folders.artifacts / base)
    return TaskTokens(Task(params.task), models.load_tokenizer(folders.artifacts / base))


def _student_job(name: str, student: StudentParams, tokens: TaskTokens, folders: Folders) -> _Job:
    """What a student learns, checked; the same for all its seeds."""
    source, file = folders.artifacts / student.learn_from, folders.artifacts / DEMONSTRATIONS_FILE
    from_labels, from_targets = student.learn_from == DEMONSTRATIONS_FILE, student.learn_from.startswith("targets/")
    transfer = [] if from_labels else read_examples(folders.artifacts / "data" / "transfer.parquet", tokens.task.fields)
    label_terms, cache_terms, sources, held, learnt = list[LabelTerm](), list[CacheTerm](), dict[str, str](), None, None

    def cache_of(folder: Path, temperature: float) -> TeacherCache:
        return TeacherCache(folder, folders.work, tokens, models.tokenizer_sha256(folders.artifacts / student.base), temperature)

    if from_targets:
        rows = target_set(source, transfer, tokens)
        sources |= {key: sha256_file(source / key) for key in ("targets.parquet", "calibration.json")}
        if student.validation_fraction:
            mask = validation_part(rows, student.validation_fraction)
            held = [row for row, of_it in zip(rows, mask, strict=True) if of_it]
            rows = [row for row, of_it in zip(rows, mask, strict=True) if not of_it]
        learnt = {row.example_id for row in rows}
        on_labels = student.ce_weight if student.ce_target == "targets" else 0.0
        loss = "cross_entropy" if student.loss == "hard" else student.loss
        label_terms.append(LabelTerm(loss, 1.0, student.batch_size, rows, on_labels))
    elif not from_labels:
        cache = cache_of(source, student.temperature)
        sources["cache"] = sha256_json(cache_manifest(source))
        rows = cache.rows(transfer)
        if student.validation_fraction:
            mask = validation_part(rows, student.validation_fraction)
            held, rows = rows.where(mask), rows.where(~mask)
            learnt = {row.example_id.rpartition(":")[2] for row in rows}
        assert student.loss != "hard"  # refused with the params
        cache_terms.append(CacheTerm(student.loss, 1.0, student.batch_size, rows, cache))
    for teacher, also in student.auxiliary.items():
        folder = folders.artifacts / "teachers" / teacher
        sources[f"auxiliary.{teacher}"] = sha256_json(cache_manifest(folder))
        if from_targets and (wanted := read_json(source / CACHES)[teacher]["manifest_sha256"]) != (
            found := sources[f"auxiliary.{teacher}"]
        ):
            made_beside = f"{student.learn_from} was made beside a cache with manifest {wanted[:12]}…"
            raise MismatchError(
                f"students.{name}.auxiliary.{teacher}: {made_beside}, and {folder} has {found[:12]}…. Run `dvc repro targets@{source.name}`."
            )
        cache = cache_of(folder, also.temperature)
        rows = cache.rows(transfer)
        if learnt is not None:
            rows = rows.where(np.array([row.example_id.rpartition(":")[2] in learnt for row in rows]))
        size = also.batch_size or student.batch_size
        cache_terms.append(CacheTerm(also.loss, also.weight, size, rows, cache, also.hidden_weight, also.layers))
    if from_labels or (student.ce_weight and student.ce_target == "demonstrations"):
        size = student.batch_size if from_labels else student.ce_batch_size or max(1, student.batch_size // 4)
        label_terms.append(LabelTerm("cross_entropy", 1.0 if from_labels else student.ce_weight, size, demonstrations(file, tokens)))
        sources["demonstrations"] = sha256_file(file)
    validation = None if held is None else Validation(held, student.evaluate_every, student.patience)
    return _Job("student", name, student, student.learn_from, tokens, sources, label_terms, cache_terms, validation)


def _check_lengths(job: _Job, base: Path) -> None:
    """Raise UsageError if a row with its answer is longer than the model takes."""
    branch, limit = max(map(len, job.tokens.completions), default=1) - 1, models.context_limit(base)
    lengths = [(row.tokens + branch, row.example_id) for term in job.label_terms for row in term.rows]
    lengths += [(row.tokens, row.example_id) for term in job.cache_terms for row in term.rows]
    longest, example_id = max(lengths)
    if limit is not None and longest > limit:
        raise UsageError(
            f"example {example_id} has {longest} tokens with its answer, and {base} takes {limit}. Lower `task.max_chars`, which quarantines "
            "longer inputs."
        )


def _train(
    job: _Job,
    runs: Mapping[str, StudentParams] | Mapping[str, TunedParams],
    threads: int | None,
    folders: Folders,
    processes: Processes,
    checkpoint_seconds: float,
) -> None:
    """All trainings of a job, one run at a time, then its metrics."""
    output = folders.artifacts / ("students" if job.kind == "student" else "tuned") / job.name
    _check_lengths(job, folders.artifacts / job.params.base)
    lock = folders.work / "training" / f"{sha256_text(str(output.resolve()))[:16]}.lock"
    with one_writer(lock) if processes.first else nullcontext():
        threads = use_machine(processes.threads(threads))
        ran = dict[int, _Ran]()
        for place, run in runs.items():
            own = f"{job.kind}-{job.name}" + (f"-seed{run.seed}" if len(runs) > 1 else "")
            checkpoint = Checkpoint(folders.work / "training", own, "", checkpoint_seconds, keeps_end=len(runs) > 1)
            ran[run.seed] = _run(replace(job, params=run), output / place, checkpoint, threads, folders, processes)
        if processes.first:
            _write_metrics(job, ran, threads, folders.metrics)
            for one in ran.values():
                one.checkpoint.remove()


@dataclass(frozen=True)
class _Ran:
    """What one training left to be written down."""

    metrics: dict[str, Any]
    outcome: Outcome
    checkpoint: Checkpoint


def _run(job: _Job, output: Path, checkpoint: Checkpoint, threads: int, folders: Folders, processes: Processes) -> _Ran:
    """Train with one seed and write its folder."""
    base = folders.artifacts / job.params.base
    about = job.about(base)
    rounding = {"threads": threads, "processes": processes.count, "torch": torch.__version__, "transformers": transformers.__version__}
    checkpoint = replace(checkpoint, fingerprint=sha256_json([about, rounding]))
    model = models.load_model(base, device=default_device())
    if job.layers is not None:
        models.cut_layers(model, models.parse_layers(job.layers, model.config.get_text_config().num_hidden_layers))
    if processes.first:
        (output / MANIFEST).unlink(missing_ok=True)  # until all is written, the folder is not complete
    outcome = train(
        model,
        job.tokens.completions,
        job.label_terms,
        job.params,
        title=checkpoint.name.replace("-", " ", 1),
        cache_terms=job.cache_terms,
        validation=job.validation,
        checkpoint=checkpoint,
        adapter=(output / "adapter", job.params.base) if job.params.adapters == "kept" else None,
        processes=processes,
    )
    steps = len(outcome.reached.losses)
    counts = {
        "steps": steps,
        "examples": steps * sum(term.batch_size for term in (*job.label_terms, *job.cache_terms)),
        "tokens": outcome.tokens,
        "parameters": models.parameter_counts(model)[0],
        "trained_parameters": outcome.tuning.trained_parameters,
        "layers": int(model.config.get_text_config().num_hidden_layers),
    }
    choice = {}
    if job.validation is not None:
        validations = dict(outcome.reached.validations)
        choice = {
            "best_step": outcome.best_step,
            "held_back_examples": len(job.validation.rows),
            "held_back_kl_nats": _significant(validations[outcome.best_step]),
            "held_back_kl_nats_before": _significant(validations[0]),
        }
    if processes.first:
        model.config._name_or_path = ""
        models.save_model(model, models.load_tokenizer(base), output)
        files = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
        own = [name for name in files if not name.startswith("seeds/") and name != "README.md"]
        write_manifest(output, {**about, "counts": counts, **choice, "trains": outcome.tuning.trains, "forward": outcome.forward}, own)
    last = outcome.reached.losses[-max(1, steps // 10) :]
    return _Ran(counts | choice | {"final_loss": _significant(math.fsum(last) / len(last))}, outcome, checkpoint)


def _write_metrics(job: _Job, ran: Mapping[int, _Ran], threads: int, metrics: Path) -> None:
    """Metrics of the first seed, with each seed's loss and choice of step if there are several; the curve; what differs from run to run."""
    name = job.name if job.kind == "student" else f"tuned-{job.name}"
    values: dict[str, Any] = {**next(iter(ran.values())).metrics, "base": job.params.base, "learn_from": job.learn_from}
    if len(ran) > 1:
        kept = ("steps", "final_loss", "best_step", "held_back_kl_nats")
        values["seeds"] = {str(seed): {key: one.metrics[key] for key in kept if key in one.metrics} for seed, one in ran.items()}
    write_json(values, metrics / "train" / f"{name}.json")
    write_text(_curve(job, {seed: one.outcome for seed, one in ran.items()}), metrics / "curves" / f"{name}.csv")
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
    """A line for each step, counted from 1: the loss before its update in nats, the learning rate, the KL of a validation after it."""
    validated, seeded, file = job.validation is not None, len(outcomes) > 1, StringIO()
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
