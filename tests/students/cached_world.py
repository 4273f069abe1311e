"""A teacher with its score cache, and a student that learns from it: for tests of learning from caches."""

import shutil

import pyarrow as pa

from pipeline.files import context_id, example_id
from pipeline.models.identity import tokenizer_sha256
from pipeline.models.loading import load_tokenizer
from pipeline.params import CacheParams, CompletionParams, StudentParams, TaskParams
from pipeline.schema import CONTEXTS, examples, write_table
from pipeline.students.cached import CachedTeacher, CacheTerm
from pipeline.students.runs import Places, train_student
from pipeline.task import Task, TaskTokens
from pipeline.teachers.capture import capture

TEMPLATE = "Review: {text}\nSentiment:"
FREE = Task(TaskParams(template=TEMPLATE, completion=CompletionParams(max_tokens=6)))
LABELS = Task(TaskParams(template=TEMPLATE, verbalisers={"negative": " bad", "positive": " good"}))
CONTEXTS_OF_TWO = ["Review: a warm film\nSentiment: a good one\n\n", "Review: bored\nSentiment: bad\n\nReview: cold\nSentiment: so-so\n\n"]
TEXTS = [
    "a warm film", "a dull, lifeless mess", "the plot goes nowhere", "I loved every minute of it", "strange little picture",
    "the actors seem bored and so was I", "funny", "terrible service, cold food, late", "every minute of this", "late",
]  # fmt: skip
GOLD = [("warm and funny", "positive"), ("bored", "negative"), ("I loved this little film", "positive"), ("cold mess", "negative")]


class World:
    """A teacher in two contexts, the transfer set, and a student of another seed."""

    def __init__(self, root, teacher, student, task=FREE, cache=None):
        self.root, self.task = root, task
        self.places = Places(root / "artifacts", root / "metrics", root / "work")
        artifacts = self.places.artifacts
        self.teacher, self.base, self.scores = artifacts / "models" / "large", artifacts / "models" / "tiny", artifacts / "scores" / "few"
        shutil.copytree(teacher, self.teacher)
        shutil.copytree(student, self.base)
        self.write_contexts("few", CONTEXTS_OF_TWO)
        self.write("transfer", [(text, None) for text in TEXTS])
        self.write("demonstrations", GOLD)
        self.capture(cache or CacheParams(encoding="full", resolution_nats=None))

    def write_contexts(self, name, texts):
        rows = [
            {"context_id": context_id(text), "name": f"{name}/{n}", "text": text, "example_ids": [], "tokens": 1}
            for n, text in enumerate(texts)
        ]
        write_table(pa.Table.from_pylist(rows, CONTEXTS), self.places.artifacts / "data" / "contexts" / f"{name}.parquet")

    def write(self, name, rows):
        made = [
            {"example_id": example_id({"text": text}), "label": label, "completion": None, "source": "s", "line": n, "text": text}
            for n, (text, label) in enumerate(rows)
        ]
        write_table(pa.Table.from_pylist(made, examples(("text",))), self.places.artifacts / "data" / f"{name}.parquet")

    def capture(self, cache, name="few", task=None):
        data = self.places.artifacts / "data"
        contexts, transfer, output = (
            data / "contexts" / f"{name}.parquet",
            data / "transfer.parquet",
            self.places.artifacts / "scores" / name,
        )
        capture(name, self.teacher, contexts, transfer, output, task or self.task, cache, "float32", self.places.work, 1)

    def source(self, temperature=1.0, task=None, tokenizer=None):
        tokens = TaskTokens(task or self.task, load_tokenizer(self.base))
        return CachedTeacher(self.scores, self.places.work, tokens, tokenizer or tokenizer_sha256(self.base), temperature), tokens

    def term(self, divergence="kl", temperature=1.0):
        source, tokens = self.source(temperature)
        return CacheTerm(divergence, 1.0, 4, source.lessons(self.places.artifacts / "data" / "transfer.parquet", tokens), source)

    def train(self, name="cd", **changes):
        values = {"base": "models/tiny", "learn_from": "scores/few", "steps": 12, "batch_size": 4, "learning_rate": 3e-3} | changes
        train_student(name, StudentParams(**values), self.task, self.places, threads=1)

    def weights(self, name="cd"):
        return (self.places.artifacts / "students" / name / "model.safetensors").read_bytes()
