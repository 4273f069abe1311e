"""Target sets where labels are unequally frequent: `python -m benchmarks.shares SOURCE [RARE_LABEL] [--rare 0.05 --rare 0.2]`, after a run.

Takes from the transfer set's texts of one source as many as give the rare label its share, by the gold labels of the source, and builds
target sets of all teachers from the caches that are there. A row for each share and way to combine the teachers: accuracy, macro-F1, recall
and precision of the rare label on these texts, log loss, expected calibration error. Without `--rare` the texts are taken as they are.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from sklearn.metrics import f1_score, log_loss, precision_score, recall_score

from pipeline.evaluation.metrics import expected_calibration_error
from pipeline.files import Folders
from pipeline.params import TargetParams, load_params
from pipeline.schema import TARGETS, read_examples, read_table, write_examples
from pipeline.targets.build import build_targets
from pipeline.task import Task

WAYS = {
    "none": {"calibration": "none"},
    "batch": {"calibration": "batch"},
    "batch_log": {"calibration": "batch_log"},
    "learned": {"calibration": "none", "weights": "learned"},
    "learned, prior estimated": {"calibration": "none", "weights": "learned", "prior": "estimate"},
    "learned, prior stated": {"calibration": "none", "weights": "learned"},
}


def main(
    source: str,
    rare_label: Annotated[str | None, typer.Argument(help="By default the least frequent one.")] = None,
    rare: Annotated[list[float] | None, typer.Option(help="Shares of the rare label.")] = None,
    gold_file: Annotated[Path | None, typer.Option(help="JSON lines with text and label, if the source itself has no labels.")] = None,
) -> None:
    """Print a line of JSON for each share and way."""
    params, here = load_params(), Folders.here()
    teachers = [name for name in params.teachers if (here.artifacts / "labelled" / f"{name}.parquet").is_file()]
    task, data = Task(params.task), here.artifacts / "data"
    if gold_file is None:
        known = read_examples(here.artifacts / "sources" / source / "examples.parquet", task.fields)
        gold = {example.example_id: example.label for example in known}
        label_of = {one.example_id: gold.get(one.example_id) for one in read_examples(data / "transfer.parquet", task.fields)}
    else:
        by_text = {row["text"].strip(): row["label"] for row in map(json.loads, gold_file.read_text("utf-8").splitlines())}
        label_of = {one.example_id: by_text.get(one.fields["text"]) for one in read_examples(data / "transfer.parquet", task.fields)}
    texts = [one for one in read_examples(data / "transfer.parquet", task.fields) if one.source == source and label_of[one.example_id]]
    counts = {label: sum(label_of[one.example_id] == label for one in texts) for label in task.labels}
    rare_label = rare_label or min(counts, key=counts.__getitem__)
    of_rare = [one for one in texts if label_of[one.example_id] == rare_label]
    others = [one for one in texts if label_of[one.example_id] != rare_label]
    for share in rare or [None]:
        kept = texts
        if share is not None:
            total = min(len(of_rare) / share, len(others) / (1 - share))
            kept = [*of_rare[: round(total * share)], *others[: round(total * (1 - share))]]
        labels = [str(label_of[one.example_id]) for one in kept]
        actual = {label: max(1, labels.count(label)) for label in task.labels}
        with tempfile.TemporaryDirectory() as scratch:
            folders = Folders(Path(scratch) / "artifacts", Path(scratch) / "metrics", Path(scratch) / "work")
            (folders.artifacts / "data").mkdir(parents=True)
            for name in ("teachers", "labelled", "data/demonstrations.parquet"):
                (folders.artifacts / name).symlink_to((here.artifacts / name).resolve())
            write_examples(kept, task.fields, folders.artifacts / "data" / "transfer.parquet")
            for way, settings in WAYS.items():
                own = {**settings, "prior": actual} if "stated" in way else settings
                build_targets("set", TargetParams.model_validate({"teachers": dict.fromkeys(teachers, 1.0), **own}), task, folders)
                rows = read_table(folders.artifacts / "targets" / "set" / "targets.parquet", TARGETS)
                print(
                    json.dumps(
                        {"share": share, "texts": len(kept), "way": way}
                        | figures(rows["probabilities"].to_pylist(), labels, task, rare_label)
                    )
                )


def figures(probabilities: list[list[float]], labels: list[str], task: Task, rare: str) -> dict[str, float]:
    """How right they are, in percent but for log loss."""
    p = np.array(probabilities, dtype=np.float64)
    p /= p.sum(axis=1, keepdims=True)
    said = [task.labels[at] for at in p.argmax(-1)]
    right = np.array([one == other for one, other in zip(said, labels, strict=True)])
    nothing = cast("Any", 0)  # scikit-learn's annotation has the strings alone
    shares = {
        "accuracy": right.mean(),
        "macro_f1": f1_score(labels, said, average="macro", zero_division=nothing),
        "recall": recall_score(labels, said, labels=[rare], average="macro", zero_division=nothing),
        "precision": precision_score(labels, said, labels=[rare], average="macro", zero_division=nothing),
        "ece": expected_calibration_error(p.max(-1), right),
    }
    found = {key: round(100 * float(value), 1) for key, value in shares.items()}
    return found | {"log_loss": round(float(log_loss(labels, p, labels=list(task.labels))), 3)}


if __name__ == "__main__":
    typer.run(main)
