"""A small artifacts folder for tests of students: a random model, a transfer set, targets, demonstrations."""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.files import write_sealed_json
from pipeline.files import example_id
from pipeline.params import StudentParams, TaskParams, TunedTeacherParams
from pipeline.schema import TARGETS, examples, write_table
from pipeline.students.runs import Places
from pipeline.task import Task

TASK = Task(TaskParams(template="Review: {text}\nSentiment:", verbalisers={"negative": " bad", "positive": " good"}))
TEXTS = [
    "a warm film", "a dull, lifeless mess", "the plot goes nowhere", "I loved every minute of it", "strange little picture",
    "the actors seem bored and so was I", "funny", "N/A x great", "terrible service, cold food, late", "every minute of this",
]  # fmt: skip
GOLD = [("warm and funny", "positive"), ("bored", "negative"), ("I loved this little film", "positive"), ("cold mess", "negative")]


@dataclass(frozen=True)
class World:
    """Folders, and the paths of what a student leaves."""

    root: Path
    base: Path

    @property
    def places(self) -> Places:
        return Places(self.root / "artifacts", self.root / "metrics", self.root / "work")

    def weights(self, folder: str = "students/cd") -> bytes:
        return (self.places.artifacts / folder / "model.safetensors").read_bytes()

    def checkpoints(self) -> list[Path]:
        return sorted(self.places.work.rglob("*.safetensors"))

    def json(self, name: str):
        return json.loads((self.root / name).read_text(encoding="utf-8"))


def make_world(root: Path, base: Path, labels=("negative", "positive")) -> World:
    artifacts = root / "artifacts"
    (artifacts / "models").mkdir(parents=True)
    (artifacts / "models" / "tiny").symlink_to(base)
    rows = [
        {"example_id": example_id({"text": text}), "label": None, "source": "s", "line": n, "text": text} for n, text in enumerate(TEXTS)
    ]
    write_table(pa.Table.from_pylist(rows, examples(TASK.fields)), artifacts / "data" / "transfer.parquet")
    gold = [
        {"example_id": example_id({"text": text}), "label": label, "source": "s", "line": n, "text": text}
        for n, (text, label) in enumerate(GOLD)
    ]
    write_table(pa.Table.from_pylist(gold, examples(TASK.fields)), artifacts / "data" / "demonstrations.parquet")
    folder = artifacts / "targets" / "mix"
    targets = []
    for number, row in enumerate(rows):
        share = (number + 1) / (len(rows) + 1)
        by_label = {"negative": 1 - share, "positive": share}
        targets.append({"example_id": row["example_id"], "probabilities": [by_label[label] for label in labels], "agreement": 1.0})
    write_table(pa.Table.from_pylist(targets, TARGETS), folder / "targets.parquet")
    write_sealed_json({"labels": list(labels)}, folder / "calibration.json")
    return World(root, base)


def student(**changes) -> StudentParams:
    values = {"base": "models/tiny", "learn_from": "targets/mix", "steps": 12, "batch_size": 4, "learning_rate": 1e-3} | changes
    return StudentParams(**values)


def tuned(**changes) -> TunedTeacherParams:
    return TunedTeacherParams(**({"base": "models/tiny", "steps": 12, "batch_size": 4, "learning_rate": 1e-3} | changes))
