"""A method's evaluation: its predictions to Parquet, metrics from these."""

from pipeline.evaluation import free_text
from pipeline.evaluation.metrics import before_temperature, detail, evaluate_predictions, membership, summary
from pipeline.evaluation.predictions import answer, models_of, predict, read_sets
from pipeline.files import Folders, write_json
from pipeline.params import Params, pick
from pipeline.schema import write_table


def evaluate(name: str, params: Params, folders: Folders) -> None:
    """Evaluate a student or baseline.

    Writes artifacts/predictions/NAME.parquet, metrics/eval/NAME.json, metrics/summary/NAME.json (one row for `dvc metrics show`) and
    metrics/detail/NAME.json (reliability, confusion, slices). Free text has no probabilities of labels, hence no calibration curves.
    """
    if name not in params.students:
        pick("students, baselines", params.baselines, name)
    settings, completion = params.evaluation, params.task.completion
    sets, models = read_sets(params, folders), models_of(name, params, folders)
    table = predict(name, models, params, folders, sets) if completion is None else answer(name, models, params, sets)
    write_table(table, folders.artifacts / "predictions" / f"{name}.parquet")
    domains = {key: entry.domain for key, entry in params.data.evaluation.items()}
    bootstrap = {"resamples": settings.bootstrap, "seed": settings.seed}
    head = {"method": name, "kind": "student" if name in params.students else "baseline"}
    broken_down = {}
    if completion is None:
        labels, members = params.task.labels, {key: membership(examples) for key, examples in sets.items()}
        temperatures = {model.run or "": model.temperature for model in models}
        before = before_temperature(table, temperatures) if set(temperatures.values()) != {1.0} else None
        result = evaluate_predictions(table, labels, **bootstrap, before=before)
        broken_down = detail(table, labels, members, domains, **bootstrap, before=before)
    else:
        result = free_text.judge(table, completion.form, **bootstrap)
    write_json({**head, "sets": result}, folders.metrics / "eval" / f"{name}.json")
    write_json(summary(result, domains), folders.metrics / "summary" / f"{name}.json")
    write_json({"method": name, **broken_down}, folders.metrics / "detail" / f"{name}.json")
