"""Training a student or a tuned teacher: from the files of earlier stages to its folder and its metrics.

Everything is checked before training. One run at a time trains for a folder. The folder's manifest is written last, and the checkpoint is
removed after it. All files but those in metrics/runtime depend on params and data alone, so that equal runs give equal bytes.
"""

import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from transformers import PreTrainedModel

from pipeline import files
from pipeline.cache.folder import CACHES, cache_manifest
from pipeline.cache.labelled import LABELLED_FILE, folds_of, with_the_teachers_lean
from pipeline.errors import MismatchError, UsageError
from pipeline.files import Folders, sha256_file, sha256_json
from pipeline.models import folders as models
from pipeline.models.held_back import HELD_BACK, HELD_BACK_FILE, LEARNT, LEARNT_FILE, STATES, Novelty, fit_temperature
from pipeline.models.machine import default_device, use_machine
from pipeline.models.process import peak_rss_bytes
from pipeline.models.trained import about_trained, load_tokens
from pipeline.params import DEMONSTRATIONS_FILE, Params, StudentParams, TunedParams, pick
from pipeline.progress import rate
from pipeline.schema import LABELLED, read_examples, write_table
from pipeline.students.auxiliary import CacheTerm, TeacherCache
from pipeline.students.checkpoint import Checkpoint
from pipeline.students.data import AnyRow, LabelTerm, StudentRow, TargetRow, balanced, compared_rows, demonstrations, split, target_set
from pipeline.students.loop import Outcome, Validation, answers, train
from pipeline.students.processes import ALONE, Processes
from pipeline.students.tuning import learning_rate
from pipeline.task import Task

TRAINING_VERSION = 7
"""Raised when the training's numbers change: a checkpoint of another version is not used."""


def train_student(name: str, params: Params, folders: Folders, processes: Processes = ALONE) -> None:
    """Write artifacts/students/NAME, metrics/train/NAME.json, metrics/curves/NAME.csv and metrics/runtime/student-NAME.json.

    One training for each seed: the first in the folder, the others in its `seeds/`. Of several `processes` each calls this, and the first
    one writes. Raises UsageError and MismatchError on bad input before training, ShotlessError if it diverges.
    """
    _Job("student", name, pick("students", params.students, name), params, folders, processes).run()


def tune_teacher(name: str, params: Params, folders: Folders) -> None:
    """Fine-tune a teacher's model on the demonstrations' labels, with no layer cut.

    Writes artifacts/tuned/NAME, with `LABELLED_FILE` in it, metrics/train/tuned-NAME.json, metrics/curves/tuned-NAME.csv and
    metrics/runtime/tuned-NAME.json.
    """
    tuned = StudentParams(**dict(pick("tuned", params.tuned, name)), learn_from=DEMONSTRATIONS_FILE)
    _Job("tuned", name, tuned, params, folders, ALONE).run()


class _Job:
    """A student, or a tuned teacher: what is learnt, checked; then its trainings."""

    def __init__(self, kind: str, name: str, student: StudentParams, params: Params, folders: Folders, processes: Processes) -> None:
        self.kind, self.name, self.student, self.folders, self.processes = kind, name, student, folders, processes
        self.threads, self.base = params.runtime.threads, folders.artifacts / student.base
        models.check_folder(self.base)
        if student.tuning == "contrastive" and processes.count > 1:
            raise UsageError(
                f"{kind} {name}: `tuning: contrastive` compares the texts of a step; train it in one process, without torchrun."
            )
        self.tokens = load_tokens(Task(params.task, student.format), self.base)
        self.sources: dict[str, str] = {}  # hashes of what is learnt from
        self.label_terms: list[LabelTerm] = []
        self.cache_terms: list[CacheTerm] = []
        self.validation: Validation | None = None
        self.held_back: list[TargetRow] = []
        self.compared: list[TargetRow] = []
        if student.learn_from == DEMONSTRATIONS_FILE:
            self._learn_demonstrations(1.0, student.batch_size)
            if kind == "tuned":
                self.compared = compared_rows(folders.artifacts / "data" / "transfer.parquet", self.tokens)
        else:
            self._learn_texts(params.data.never_held_back)

    def _learn_demonstrations(self, weight: float, batch_size: int) -> None:
        """Add the cross-entropy on the demonstrations' labels."""
        file = self.folders.artifacts / DEMONSTRATIONS_FILE
        self.label_terms.append(LabelTerm("cross_entropy", weight, batch_size, self._weighted(demonstrations(file, self.tokens))))
        self.sources["demonstrations"] = sha256_file(file)

    def _learn_texts(self, never_held_back: Collection[str]) -> None:
        """Add all that is learnt from a target set, a round or caches, and what is learnt beside it; hold texts back, of other sources."""
        student, kind = self.student, self.student.learn_from.partition("/")[0]
        source = self.folders.artifacts / student.learn_from
        file = source / "texts.parquet" if kind == "rounds" else self.folders.artifacts / "data" / "transfer.parquet"
        texts = read_examples(file, self.tokens.task.fields)
        if kind in {"targets", "rounds"}:
            self.sources |= {name: sha256_file(source / name) for name in ("targets.parquet", "calibration.json")}
            rows = target_set(source, texts, self.tokens)
            if student.held_back:
                chosen = {example.example_id for example in texts if example.source in never_held_back}
                self.held_back, rows = split(rows, "held_back", student.held_back, chosen)
                self.sources |= {"never_held_back": sha256_json(sorted(chosen))} if chosen else {}
            rows = self._without_validation(rows)
            loss = "cross_entropy" if student.loss == "hard" else student.loss
            of_labels = student.ce_weight if student.ce_target == "targets" else 0.0
            self.label_terms.append(LabelTerm(loss, 1.0, student.batch_size, self._weighted(rows), of_labels))
        else:
            assert student.loss != "hard", "params were checked"
            cache = self._cache("cache", source, student.temperature)
            rows = self._without_validation(cache.rows(texts))
            self.cache_terms.append(CacheTerm(student.loss, 1.0, student.batch_size, rows, cache))
        learnt = {row.example for row in rows}
        for teacher, also in student.auxiliary.items():
            cache = self._cache(f"auxiliary.{teacher}", self.folders.artifacts / "teachers" / teacher, also.temperature)
            found = self.sources[f"auxiliary.{teacher}"]
            if kind == "targets" and found != (wanted := files.read_json(source / CACHES)[teacher]["manifest_sha256"]):
                raise MismatchError(
                    f"students.{self.name}.auxiliary.{teacher}: {student.learn_from} was made beside a cache with manifest {wanted[:12]}…, "
                    f"and {cache.folder} has {found[:12]}…. Run `dvc repro targets@{source.name}`."
                )
            rows = [row for row in cache.rows(texts) if row.example in learnt]
            size = also.batch_size or student.batch_size
            self.cache_terms.append(CacheTerm(also.loss, also.weight, size, rows, cache, also.hidden_weight, also.layers))
        if student.ce_weight and student.ce_target == "demonstrations":
            self._learn_demonstrations(student.ce_weight, student.ce_batch_size or max(1, student.batch_size // 4))

    def _without_validation(self, rows: list[AnyRow]) -> list[AnyRow]:
        if not self.student.validation_fraction:
            return rows
        held, learnt = split(rows, "validation_fraction", self.student.validation_fraction)
        self.validation = Validation(held, self.student.evaluate_every, self.student.patience)
        return learnt

    def _weighted(self, rows: list[TargetRow]) -> list[TargetRow]:
        return balanced(rows) if self.student.class_weight == "balanced" else rows

    def _cache(self, name: str, folder: Path, temperature: float) -> TeacherCache:
        self.sources[name] = sha256_json(cache_manifest(folder))
        return TeacherCache(folder, self.folders.work, self.tokens, models.tokenizer_sha256(self.base), temperature)

    def run(self) -> None:
        """The training of each seed, then their metrics."""
        self._check_lengths()
        output = self.folders.artifacts / ("students" if self.kind == "student" else "tuned") / self.name
        training, runs, first = self.folders.work / "training", self.student.runs, self.processes.first
        lock = training / f"{files.sha256_text(str(output.resolve()))[:16]}.lock"
        with files.one_writer(lock) if first else nullcontext():
            threads = use_machine(self.processes.threads(self.threads))
            rounding = [threads, self.processes.count, torch.__version__, transformers.__version__]
            outcomes, values, checkpoints = dict[int, Outcome](), dict[int, dict[str, Any]](), list[Checkpoint]()
            for place, entry in runs.items():
                own = f"{self.kind}-{self.name}" + (f"-seed{entry.seed}" if len(runs) > 1 else "")
                about = about_trained(self.name, self.tokens, self._provenance(entry))
                checkpoints.append(Checkpoint(training, own, sha256_json([about, rounding]), keeps_end=len(runs) > 1))
                outcomes[entry.seed], values[entry.seed] = self._run(entry, output / place, about, checkpoints[-1])
            if first:
                self._write_metrics(outcomes, values, threads)
                for checkpoint in checkpoints:
                    checkpoint.remove()

    def _check_lengths(self) -> None:
        longest = max([*self._learnt(), *self.held_back, *self.compared], key=lambda row: row.tokens)
        tokens, limit = longest.tokens + max(map(len, self.tokens.completions), default=1) - 1, self.tokens.limit
        if limit is not None and tokens > limit:  # what a teacher of a longer limit read token by token is not cut for this one
            raise UsageError(
                f"example {longest.example_id} has {tokens} tokens with its answer, and {self.base} takes {limit}. Set `task.max_tokens`, "
                "so that the teacher reads no more of a text than the student can."
            )

    def _learnt(self) -> list[StudentRow]:
        """All rows that weights are learnt from or chosen by."""
        terms = [*self.label_terms, *self.cache_terms, *([self.validation] if self.validation is not None else [])]
        return [row for term in terms for row in term.rows]

    def _provenance(self, entry: StudentParams) -> dict[str, Any]:
        """Where the weights come from, by content: no clock and no machine."""
        return {
            "kind": self.kind,
            "base": entry.base,
            "base_weights_sha256": models.weights_sha256(self.base),
            "base_tokenizer_sha256": models.tokenizer_sha256(self.base),
            "layers": entry.layers,
            "learn_from": entry.learn_from,
            "sources_sha256": self.sources,
            "params": entry.model_dump(mode="json", include=None if self.kind == "student" else set(TunedParams.model_fields)),
            "training_version": TRAINING_VERSION,
        }

    def _run(self, entry: StudentParams, output: Path, about: dict[str, Any], checkpoint: Checkpoint) -> tuple[Outcome, dict[str, Any]]:
        """Train with one seed and write its folder; the outcome, and what of it goes to the metrics."""
        model = models.load_model(self.base, device=default_device(), labels=self.tokens.task.labels, seed=entry.seed)
        config = model.config.get_text_config()
        if entry.layers is not None:
            models.cut_layers(model, models.parse_layers(entry.layers, config.num_hidden_layers))
        if self.processes.first:
            (output / files.MANIFEST).unlink(missing_ok=True)  # until all is written, the folder is not complete
        outcome = train(
            model,
            self.tokens.completions,
            self.label_terms,
            entry,
            title=checkpoint.name.replace("-", " ", 1),
            cache_terms=self.cache_terms,
            validation=self.validation,
            checkpoint=checkpoint,
            adapter=(output / "adapter", entry.base) if entry.adapters == "kept" else None,
            processes=self.processes,
        )
        reached, steps = outcome.reached, len(outcome.reached.losses)
        counts = {
            "steps": steps,
            "examples": steps * sum(term.batch_size for term in (*self.label_terms, *self.cache_terms)),
            "tokens": outcome.tokens,
            "parameters": model.num_parameters(),
            "trained_parameters": outcome.tuning.trained_parameters,
            "layers": int(config.num_hidden_layers),
            "architecture": type(model).__name__,
        }
        choice: dict[str, Any] = {}
        if self.validation is not None:
            (best_step, best), (_, before) = reached.best, reached.validations[0]
            choice = {"best_step": best_step, "validation_examples": len(self.validation.rows)}
            choice |= {"validation_kl_nats": _significant(best), "validation_kl_nats_before": _significant(before)}
        if self.processes.first:
            choice |= self._answer_held_back(model, output) if self.kind == "student" else {}
            model.config._name_or_path = ""
            models.save_model(model, models.load_tokenizer(self.base), output)
            if self.kind == "tuned":
                write_table(self._answer_labelled(entry, model), output / LABELLED_FILE)
            names = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
            about = about | {"counts": counts, **choice, "trains": outcome.tuning.trains, "forward": outcome.forward}
            files.write_manifest(output, about, [name for name in names if not name.startswith("seeds/") and name != "README.md"])
        last = reached.losses[-max(1, steps // 10) :]
        return outcome, counts | choice | {"final_loss": _significant(math.fsum(last) / len(last))}

    def _answer_labelled(self, entry: StudentParams, tuned: PreTrainedModel) -> pa.Table:
        """`schema.LABELLED` without a context: each fold of the labelled examples is answered by a model that was tuned without it."""
        [term], rows, size = self.label_terms, list[dict[str, Any]](), entry.micro_batch or entry.batch_size
        usual, _ = answers(tuned, self.tokens.completions, self.compared, size)
        for number, places in enumerate(folds_of([row.label for row in term.rows]), 1):
            fold, learnt = [term.rows[place] for place in places], [row for at, row in enumerate(term.rows) if at not in places]
            model = models.load_model(self.base, device=default_device(), labels=self.tokens.task.labels, seed=entry.seed)
            steps = math.ceil(entry.steps * len(learnt) / len(term.rows))
            own = entry.model_copy(update={"steps": steps})
            train(model, self.tokens.completions, [replace(term, rows=learnt)], own, title=f"{self.name} without fold {number}")
            said, _ = answers(model, self.tokens.completions, [*fold, *self.compared], size)
            said = with_the_teachers_lean(said[: len(fold)], said[len(fold) :], usual)
            rows += [{"context_id": "", "example_id": row.example_id, "label_logprobs": own} for row, own in zip(fold, said, strict=True)]
        return pa.Table.from_pylist(rows, schema=LABELLED)

    def _answer_held_back(self, model: PreTrainedModel, output: Path) -> dict[str, Any]:
        """Write the files that `pipeline/models/held_back.py` describes; the student's `temperature`, and how often it agrees."""
        (output / HELD_BACK_FILE).unlink(missing_ok=True)
        found, states = dict[str, Any](temperature=1.0), dict[str, np.ndarray]()
        if held := self.held_back:
            known = sorted(self.label_terms[0].rows, key=lambda row: row.example_id)[:STATES]
            size = self.student.micro_batch or self.student.batch_size
            scores, last = answers(model, self.tokens.completions, [*held, *known], size)
            scores, targets = scores[: len(held)], np.array([row.target for row in held])
            states = dict(zip([row.example for row in known], last[len(held) :], strict=True))
            distances = Novelty(last[len(held) :]).distances(last[: len(held)])
            columns = [[row.example for row in held], list(scores), list(targets), distances]
            arrays = [pa.array(values, field.type) for values, field in zip(columns, HELD_BACK, strict=True)]
            write_table(pa.Table.from_arrays(arrays, schema=HELD_BACK), output / HELD_BACK_FILE)
            agreement = float((scores.argmax(-1) == targets.argmax(-1)).mean())
            found = {
                "temperature": fit_temperature(scores, targets),
                "held_back": len(held),
                "held_back_agreement": _significant(agreement),
            }
        ids = sorted({row.example for row in self._learnt()})
        arrays = [pa.array(ids), pa.array([states.get(one, ()) for one in ids], LEARNT.field("state").type)]
        write_table(pa.Table.from_arrays(arrays, schema=LEARNT), output / LEARNT_FILE)
        return found

    def _write_metrics(self, outcomes: Mapping[int, Outcome], values: Mapping[int, dict[str, Any]], threads: int) -> None:
        """Those of the first seed, with some of each if there are several; the curve; what differs from run to run."""
        name, metrics = self.name if self.kind == "student" else f"tuned-{self.name}", self.folders.metrics
        written: dict[str, Any] = {**next(iter(values.values())), "base": self.student.base, "learn_from": self.student.learn_from}
        if len(values) > 1:
            kept = ("steps", "final_loss", "best_step", "validation_kl_nats")
            written["seeds"] = {str(seed): {key: one[key] for key in kept if key in one} for seed, one in values.items()}
        files.write_json(written, metrics / "train" / f"{name}.json")
        curve: list[dict[str, Any]] = []
        for seed, outcome in outcomes.items():
            kl = {step: _significant(value) for step, value in outcome.reached.validations}
            for step, loss in enumerate(outcome.reached.losses, 1):
                rate_then = learning_rate(step - 1, self.student) if step <= self.student.steps else 0.0  # a head that was fitted
                row = {"step": step, "loss": _significant(loss), "learning_rate": _significant(rate_then)}
                row |= {"validation_kl": kl.get(step, "")} if self.validation is not None else {}
                curve.append(row | ({"seed": seed} if len(values) > 1 else {}))
        lines = [",".join(map(str, line)) + "\n" for line in (curve[0], *(row.values() for row in curve))]
        files.write_text("".join(lines), metrics / "curves" / f"{name}.csv")
        seconds = sum(outcome.seconds for outcome in outcomes.values())
        runtime = {
            "seconds": round(seconds, 3),
            "tokens_per_second": round(rate(sum(outcome.seen for outcome in outcomes.values()), seconds), 1),
            "peak_rss_bytes": peak_rss_bytes(),
            "threads": threads,
            "resumed_at_step": sum(outcome.resumed_at for outcome in outcomes.values()),
        }
        files.write_json(runtime, metrics / "runtime" / f"{self.kind}-{self.name}.json")


def _significant(value: float) -> float:
    """A number rounded to six significant digits."""
    return float(f"{value:.6g}")
