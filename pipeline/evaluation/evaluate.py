"""One method's evaluation: predictions to Parquet, metrics from those predictions, cost measured apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.evaluation.cost import Job, Prompts, measure
from pipeline.evaluation.predict import Rows, predict_baseline, predict_student, read_sets, teacher_contexts
from pipeline.files import read_json, write_json
from pipeline.metrics import evaluate_predictions, summary
from pipeline.models.identity import weights_sha256
from pipeline.models.loading import load_tokenizer
from pipeline.params import Params, pick
from pipeline.schema import write_table
from pipeline.tasks import Task, TaskTokens


def evaluate(name: str, params: Params, artifacts: Path, metrics: Path, work: Path) -> None:
    """Evaluate a student or baseline: `artifacts/predictions/NAME.parquet`, `metrics/eval/NAME.json`, `metrics/summary/NAME.json` (one row
    for `dvc metrics show`), `metrics/cost/NAME.json`.

    The cost file is no DVC output: it holds times of this machine.
    """
    pick("students, baselines", {**params.students, **params.baselines}, name)
    task, threads = Task(params.task), params.runtime.threads
    sets = read_sets(artifacts / "data" / "evaluation", list(params.data.evaluation), task)
    timed = next(iter(sets.values()))[: params.evaluation.cost_examples]
    if name in params.students:
        folder = artifacts / "students" / name
        table = predict_student(name, folder, task, sets, work, threads)
        job = Job(models=[_prompts(folder, [""], task, timed)], threads=threads)
    else:
        baseline = params.baselines[name]
        calibration = read_json(artifacts / baseline.prompts / "calibration.json")
        ensemble = baseline.contexts == "ensemble"
        table = predict_baseline(name, calibration, ensemble, task, sets, artifacts, work, threads)
        job = _baseline_job(calibration, ensemble, task, timed, artifacts, threads)
    write_table(table, artifacts / "predictions" / f"{name}.parquet")
    settings = params.evaluation
    result = evaluate_predictions(table, task.labels, resamples=settings.bootstrap, seed=settings.seed)
    kind = "student" if name in params.students else "baseline"
    write_json({"method": name, "kind": kind, "subject": job.subject, "sets": result}, metrics / "eval" / f"{name}.json")
    domains = {key: entry.domain for key, entry in params.data.evaluation.items()}
    write_json(summary(result, domains), metrics / "summary" / f"{name}.json")
    measure(job, work, metrics / "cost" / f"{name}.json")


def _baseline_job(calibration: Mapping[str, Any], ensemble: bool, task: Task, timed: Rows, artifacts: Path, threads: int | None) -> Job:
    """An ensemble's answer takes all its contexts; a context on its own takes one, and the first stands for the others."""
    models = []
    for teacher, entry in calibration["teachers"].items():
        contexts = [context["text"] for context in teacher_contexts(calibration, teacher, artifacts)]
        models.append(_prompts(artifacts / entry["model"], contexts if ensemble else contexts[:1], task, timed))
    return Job(models=models if ensemble else models[:1], threads=threads)


def _prompts(folder: Path, contexts: list[str], task: Task, timed: Rows) -> Prompts:
    tokens = TaskTokens(task, load_tokenizer(folder))
    queries = tokens.query_ids([task.query(row) for row in timed])
    prefixes = [tokens.prefix_ids(context) for context in contexts]
    return Prompts(folder=str(folder), weights=weights_sha256(folder), examples=[[[*p, *query] for p in prefixes] for query in queries])
