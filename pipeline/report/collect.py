"""Everything the report is made from, read from disk once.

Predictions are required: each student and baseline of the params has a file, and every quality number is computed from it again. What else
there is (costs, training curves, counts, fingerprints) comes from other stages' metrics; a missing file is no error, so that a report
can be had early, and the page says what is missing and which command writes it. A file that is there and cannot be read is an error.
"""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa
from polars.exceptions import PolarsError

from pipeline import schema
from pipeline.errors import CorruptError, UsageError
from pipeline.files import sha256_file
from pipeline.params import Params

Json = dict[str, Any]
MOST_QUARANTINED = 5


@dataclass(frozen=True)
class Inputs:
    """What was found under the project's folder; dicts are in the params' order and hold only what exists."""

    params: Params
    predictions: dict[str, pa.Table]
    """Baselines, then students."""
    cost: dict[str, Json]
    stale_cost: tuple[str, ...]
    """Methods whose cost was measured on something else than what made the predictions."""
    prepare: Json | None
    targets: dict[str, Json]
    training: dict[str, Json]
    curves: dict[str, pl.DataFrame]
    """Columns step, loss, learning_rate."""
    provenance: dict[str, Json]
    manifests: dict[str, Json]
    """Teacher → manifest of its scores."""
    fidelity: dict[str, Json]
    """Teacher → what its cache holds of it, by rows that were scored again."""
    capture: dict[str, Json]
    """Teacher → seconds and rows of its capture."""
    sources: dict[str, Json]
    """Model → where it came from."""
    detail: dict[str, Json]
    """Method → reliability bins, confusion, slices."""
    risks: dict[str, Json]
    """Student → risk checks."""
    compare: Json | None
    """KL to the reference and exact tests of differences."""
    break_even: Json | None
    texts: dict[str, dict[str, str]]
    """Evaluation set → example → its input; no entry where the set's file is not there."""
    quarantined: tuple[Json, ...]
    """The first rows set aside."""

    def kind(self, method: str) -> Literal["student", "baseline"]:
        """Whether a method is a student or a baseline."""
        return "student" if method in self.params.students else "baseline"


def stage_of(params: Params, method: str) -> str:
    """The DVC stage that evaluates a method."""
    return f"{'evaluate' if method in params.students else 'baseline'}@{method}"


def collect(params: Params, root: Path) -> Inputs:
    """Read predictions and metrics of all methods in `params` under the project's folder `root`.

    Raises UsageError naming every predictions file that is missing, CorruptError where a file is not what it should be.
    """
    names = [*params.baselines, *params.students]
    paths = {name: root / "artifacts" / "predictions" / f"{name}.parquet" for name in names}
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        stages = " ".join(stage_of(params, name) for name in missing)
        raise UsageError(f"{paths[missing[0]]}: no such file; the report needs the predictions of every method. Run `dvc repro {stages}`.")
    kind = schema.PREDICTIONS if params.task.completion is None else schema.ANSWERS
    predictions = {name: schema.read_table(path, kind) for name, path in paths.items()}
    for name, table in predictions.items():
        _check_sets(table, params, paths[name])
    metrics, artifacts = root / "metrics", root / "artifacts"
    measured = _read_each(metrics / "cost", "{}.json", names)
    # Costs are no outputs of DVC, so they can be older than the predictions; both carry the hash of the weights and prompts they are of.
    evaluated = _read_each(metrics / "eval", "{}.json", names)
    for name, entry in evaluated.items():
        if (written := entry.get("predictions_sha256")) is not None and sha256_file(paths[name]) != written:
            raise CorruptError(f"{paths[name]}: are not the predictions of {metrics / 'eval' / f'{name}.json'}; run `dvc repro`.")
    subjects = {name: entry.get("subject") for name, entry in evaluated.items()}
    cost = {name: value for name, value in measured.items() if subjects.get(name, "") == value.get("measured", {}).get("subject")}
    curves = {name: _read_curve(path) for name in params.students if (path := metrics / "curves" / f"{name}.csv").is_file()}
    return Inputs(
        params=params,
        predictions=predictions,
        cost=cost,
        stale_cost=tuple(name for name in measured if name not in cost),
        prepare=_read_json(metrics / "prepare.json"),
        targets=_read_each(metrics / "targets", "{}.json", params.targets),
        training=_read_each(metrics / "train", "{}.json", params.students),
        curves=curves,
        provenance=_read_each(artifacts / "students", "{}/provenance.json", params.students),
        manifests=_read_each(artifacts / "scores", "{}/manifest.json", params.teachers),
        fidelity=_read_each(metrics / "fidelity", "{}.json", params.teachers),
        capture=_read_each(metrics / "runtime", "teacher-{}.json", params.teachers),
        sources=_read_each(artifacts / "models", "{}/source.json", params.models),
        detail=_read_each(metrics / "detail", "{}.json", names),
        risks=_read_each(metrics / "risk", "{}.json", params.students),
        compare=_read_json(metrics / "compare.json"),
        break_even=_read_json(metrics / "runtime" / "break-even.json"),
        texts=_read_texts(artifacts / "data" / "evaluation", params),
        quarantined=_read_quarantine(artifacts / "data" / "quarantine.jsonl"),
    )


def _check_sets(table: pa.Table, params: Params, path: Path) -> None:
    found, wanted = set(table.column("set").unique().to_pylist()), set(params.data.evaluation)
    if found != wanted:
        raise CorruptError(
            f"{path}: has evaluation sets {sorted(found)}, params.yaml has {sorted(wanted)}; run `dvc repro {stage_of(params, path.stem)}`."
        )


def _read_each(folder: Path, pattern: str, names: Any) -> dict[str, Json]:
    found = {name: _read_json(folder / pattern.format(name)) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _read_json(path: Path) -> Json | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"{path}: not JSON ({error}); run the stage that writes it again.") from None
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: expected an object, found {type(value).__name__}; run the stage that writes it again.")
    return value


def _read_texts(folder: Path, params: Params) -> dict[str, dict[str, str]]:
    """Each example's input fields, joined as they follow each other in the template."""
    found = {}
    for name in params.data.evaluation:
        path = folder / f"{name}.parquet"
        if path.is_file():
            rows = schema.read_table(path, schema.examples(params.task.fields)).to_pylist()
            found[name] = {row["example_id"]: " / ".join(row[field] for field in params.task.fields) for row in rows}
    return found


def _read_quarantine(path: Path) -> tuple[Json, ...]:
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8") as file:
        try:
            return tuple(json.loads(line) for line in islice(file, MOST_QUARANTINED))
        except ValueError as error:
            raise CorruptError(f"{path}: not JSON lines ({error}); run `dvc repro -f prepare` again.") from None


def _read_curve(path: Path) -> pl.DataFrame:
    wanted = {"step": pl.Int64, "loss": pl.Float64, "learning_rate": pl.Float64}
    try:
        curve = pl.read_csv(path)
        curve = curve.filter(pl.col("seed") == pl.col("seed").first()) if "seed" in curve.columns else curve  # one stands for all
        return curve.select(pl.col(name).cast(kind) for name, kind in wanted.items())
    except PolarsError as error:
        raise CorruptError(f"{path}: expected columns {', '.join(wanted)} of numbers ({error}); run the student's stage again.") from None
