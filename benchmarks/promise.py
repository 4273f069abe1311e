"""`python -m benchmarks.promise`: does a threshold keep its promise? Run in a project after its targets and its teacher's evaluation.

First on held-back answers of the students: 200 random halves, temperature and threshold from one, agreement in the other. Such a half is
small, so a promise counts as broken if fewer of its answers agree than promised; the other half's own chance is in that number. Then on
simulated texts, where the true agreement is known. Then on the evaluation sets: the threshold of all held-back texts, with the novelty
gate and without, against the teacher's predictions there. `movie` learnt of `cd`'s texts those of one source, so the others are shifted.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.special import expit, softmax

from pipeline.errors import UsageError
from pipeline.files import Folders
from pipeline.models.held_back import HELD_BACK, HELD_BACK_FILE, agreeing, fit_temperature, threshold
from pipeline.params import Params, load_params
from pipeline.schema import PREDICTIONS, TARGETS, read_examples, read_table, write_table
from pipeline.serving import Predictor
from pipeline.students.train import train_student

PROMISES = (0.85, 0.9, 0.95, 0.98)
SPLITS = 200


def main(
    train: Annotated[bool, typer.Option(help="Train both students first.")] = False,
    teacher: Annotated[str, typer.Option(help="The baseline that agreement is counted with.")] = "teacher",
) -> None:
    """Print three tables."""
    folders, params, names = Folders.here(), load_params(), ["cd", "movie"]
    if train:
        _train(params, folders)
    print(f"| {SPLITS} halves | promise | refused | answered | agree | broken |\n|---|---:|---:|---:|---:|---:|")
    for name in names:
        rows = read_table(folders.artifacts / "students" / name / HELD_BACK_FILE, HELD_BACK)
        scores, targets = (np.array(rows[column].to_pylist(), dtype=np.float64) for column in ("label_logprobs", "probabilities"))
        _halves(name, scores, targets)
    _simulated()
    print("| student → texts | promise | gate | answered | agree |\n|---|---:|---|---:|---:|")
    predictions = read_table(folders.artifacts / "predictions" / f"{teacher}.parquet", PREDICTIONS).to_pylist()
    said = {(row["set"], row["example_id"]): row["predicted"] for row in predictions}
    for name in names:
        _shifted(name, folders.artifacts, said, list(params.data.evaluation), params.task.fields)


def _train(params: Params, folders: Folders) -> None:
    mix, movie = (folders.artifacts / "targets" / name for name in (params.students["cd"].learn_from.partition("/")[2], "movie"))
    shutil.copytree(mix, movie, dirs_exist_ok=True)
    transfer = read_examples(folders.artifacts / "data" / "transfer.parquet", params.task.fields)
    own, rows = {one.example_id for one in transfer if one.source == "movie"}, read_table(mix / "targets.parquet", TARGETS)
    write_table(rows.filter([one in own for one in rows["example_id"].to_pylist()]), movie / "targets.parquet")
    cd = params.students["cd"]
    params = params.model_copy(update={"students": {"cd": cd, "movie": cd.model_copy(update={"learn_from": "targets/movie"})}})
    for name in params.students:
        train_student(name, params, folders)


def _line(name: str, promise: float, found: list[tuple[float, float]], broken: list[bool]) -> None:
    answered, agree = np.mean(found, axis=0) if found else (np.nan, np.nan)
    print(f"| {name} | {promise:.0%} | {SPLITS - len(found)} | {answered:.1%} | {agree:.1%} | {sum(broken)} |")


def _halves(name: str, scores: np.ndarray, targets: np.ndarray) -> None:
    rng, agrees = np.random.default_rng(0), scores.argmax(-1) == targets.argmax(-1)
    for promise in PROMISES:
        found, broken = list[tuple[float, float]](), list[bool]()
        for _ in range(SPLITS):
            one, other = np.array_split(rng.permutation(len(scores)), 2)
            confidence = softmax(scores / fit_temperature(scores[one], targets[one]), axis=-1).max(-1)
            try:
                answered = confidence[other] >= threshold(confidence[one], agrees[one], promise).confidence
            except UsageError:
                continue
            agree = float(agrees[other][answered].mean())
            found.append((float(answered.mean()), agree))
            broken.append(agree < promise)
        _line(f"{name}, {len(scores)} held back", promise, found, broken)


def _simulated() -> None:
    rng = np.random.default_rng(0)
    everybody = rng.random(100_000)
    chances = expit(6 * everybody + 0.5)
    for count in (225, 1000):
        for promise in PROMISES:
            found, broken = list[tuple[float, float]](), list[bool]()
            for _ in range(SPLITS):
                drawn = rng.integers(len(everybody), size=count)
                try:
                    least = threshold(everybody[drawn], rng.random(count) < chances[drawn], promise).confidence
                except UsageError:
                    continue
                agree = float(chances[everybody >= least].mean())
                found.append((float((everybody >= least).mean()), agree))
                broken.append(agree < promise)
            _line(f"simulated, {count:,} held back", promise, found, broken)


def _shifted(name: str, artifacts: Path, said: dict[tuple[str, str], str], sets: list[str], fields: tuple[str, ...]) -> None:
    predictor = Predictor(artifacts / "students" / name, keep_states=True)
    for key in sets:
        examples = read_examples(artifacts / "data" / "evaluation" / f"{key}.parquet", fields)
        found = predictor.predict([example.fields for example in examples])
        confidence, states = np.array([one.confidence for one in found]), np.array([one.state for one in found])
        agrees = np.array([one.label == said[key, example.example_id] for one, example in zip(found, examples, strict=True)])
        for promise in PROMISES:
            try:
                limit = agreeing(predictor.student, promise)
            except UsageError:
                print(f"| {name} → {key} | {promise:.0%} | | refused | |")
                continue
            for gate, own in (("with", limit), ("without", replace(limit, novelty=None))):
                answered = own.answers(confidence, states)
                agree = f"{agrees[answered].mean():.1%}" if answered.any() else "–"
                print(f"| {name} → {key} | {promise:.0%} | {gate} | {answered.mean():.1%} | {agree} |")


if __name__ == "__main__":
    typer.run(main)
