"""One method's evaluation: predictions to Parquet, metrics from those predictions, cost measured apart."""

from pathlib import Path

import polars as pl

from pipeline.evaluation.judging import judge
from pipeline.evaluation.judging import summary as summary_of_answers
from pipeline.evaluation.answers import answer_sets
from pipeline.evaluation.cost import measure
from pipeline.evaluation.detail import detail, membership
from pipeline.evaluation.jobs import Inputs, baseline_job, by_demonstrations, student_job
from pipeline.evaluation.predict import predict_baseline, predict_student, read_sets
from pipeline.files import read_sealed_json, write_json
from pipeline.files import sha256_file
from pipeline.evaluation.metrics import evaluate_predictions, summary
from pipeline.params import Params, pick
from pipeline.schema import write_table
from pipeline.task import Task


def evaluate(name: str, params: Params, artifacts: Path, metrics: Path, work: Path) -> None:
    """Evaluate a student or baseline.

    Writes `artifacts/predictions/NAME.parquet`, `metrics/eval/NAME.json`, `metrics/summary/NAME.json` (one row for `dvc metrics show`),
    `metrics/detail/NAME.json` (reliability, confusion, slices) and `metrics/cost/NAME.json`, which is no output of DVC: it holds times of
    this machine.
    """
    pick("students, baselines", {**params.students, **params.baselines}, name)
    if params.task.completion is not None:
        _evaluate_answers(name, params, artifacts, metrics, work)
        return
    task, threads, settings = Task(params.task), params.runtime.threads, params.evaluation
    folder = artifacts / "data" / "evaluation"
    sets = read_sets(folder, list(params.data.evaluation), task)
    inputs = Inputs.of(task, next(iter(sets.values())), settings.cost_examples, threads)
    calibration = None
    if name in params.students:
        folder_of = artifacts / "students" / name
        several = params.students[name].seeds is not None and len(params.students[name].runs) > 1
        folders = {f"seed {run.seed}" if several else "": folder_of / place for place, run in params.students[name].runs.items()}
        table = predict_student(name, folders, task, sets, work, threads)
        job = student_job(artifacts / "students" / name, inputs)
    else:
        baseline = params.baselines[name]
        calibration = read_sealed_json(artifacts / baseline.prompts / "calibration.json")
        ensemble = baseline.contexts == "ensemble"
        table = predict_baseline(name, calibration, ensemble, task, sets, artifacts, work, threads)
        job = baseline_job(calibration, ensemble, inputs, artifacts)
    predictions = artifacts / "predictions" / f"{name}.parquet"
    write_table(table, predictions)
    bootstrap = {"resamples": settings.bootstrap, "seed": settings.seed}
    result = evaluate_predictions(table, task.labels, **bootstrap)
    kind = "baseline" if calibration else "student"
    of = {"subject": job.subject, "predictions_sha256": sha256_file(predictions)}
    write_json({"method": name, "kind": kind, **of, "sets": result}, metrics / "eval" / f"{name}.json")
    members = {key: membership(pl.read_parquet(folder / f"{key}.parquet"), task.fields) for key in sets}
    domains = {key: entry.domain for key, entry in params.data.evaluation.items()}
    write_json(summary(result, domains), metrics / "summary" / f"{name}.json")
    write_json({"method": name, **detail(table, task.labels, members, domains, **bootstrap)}, metrics / "detail" / f"{name}.json")
    cost = measure(job, work)
    if calibration:
        cost["by_demonstrations"] = by_demonstrations(calibration, settings.cost_demonstrations, inputs, artifacts, work)
    write_json(cost, metrics / "cost" / f"{name}.json")


def _evaluate_answers(name: str, params: Params, artifacts: Path, metrics: Path, work: Path) -> None:
    """The same where answers are free text: no probabilities of labels, hence no calibration curves; cost is not measured."""
    table = answer_sets(name, params, artifacts, work)
    write_table(table, artifacts / "predictions" / f"{name}.parquet")
    form = params.task.completion.form if params.task.completion is not None else None
    sets = judge(table, form)
    domains = {key: entry.domain for key, entry in params.data.evaluation.items()}
    kind = "student" if name in params.students else "baseline"
    write_json({"method": name, "kind": kind, "sets": sets}, metrics / "eval" / f"{name}.json")
    write_json(summary_of_answers(sets, domains), metrics / "summary" / f"{name}.json")
    write_json({"method": name}, metrics / "detail" / f"{name}.json")
