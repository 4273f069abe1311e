"""A project folder with a teacher, its contexts and a transfer set."""

import shutil

import polars as pl
import pytest

from pipeline.cache import folder as cache_folder
from pipeline.cache.folder import read_cache
from pipeline.files import Folders
from pipeline.params import parse_params
from pipeline.schema import Context, Example, write_contexts, write_examples
from pipeline.teachers import engines, scorer
from pipeline.teachers.capture import capture

VERBALISERS = {"positive": " good", "negative": " bad", "mixed": " so-so"}  # the last has several tokens
TASK = {"template": "Review: {text}\nSentiment:", "verbalisers": VERBALISERS, "content_free": ["N/A", ""]}
ONE = Context("shots/0", "", (({"text": "a warm film"}, "positive"),))
TWO = Context("shots/1", "Answer.", (({"text": "bored"}, "negative"), ({"text": "I loved it"}, "positive")))
CONTEXTS = [Context("shots/2"), ONE, TWO]
TEXTS = ["a warm and funny film", "a dull, lifeless mess", "funny", "strange", "the plot goes nowhere", "cold food", "N/A x", "x", "late x"]
KEPT = {"encoding": "top_k_tail", "top_k": 5, "resolution_nats": None}


def example(text, line=1):
    return Example({"text": text}, source="s", line=line, completion=f"{text[:9]}!")


class World:
    """Captures as the stage does."""

    def __init__(self, root, model_folder):
        self.folders = Folders(root / "artifacts", root / "metrics", root / "work")
        self.model = self.folders.artifacts / "models" / "tiny"
        shutil.copytree(model_folder, self.model)
        self.task, self.teacher = TASK, {"cache": KEPT, "dtype": "float32"}
        self.runtime = {"threads": 1}
        self.write_contexts(CONTEXTS)
        self.write_transfer(TEXTS)
        self.write_labelled({})

    @property
    def output(self):
        return self.folders.artifacts / "teachers" / "few"

    def write_contexts(self, contexts):
        write_contexts(contexts, self.folders.artifacts / "data" / "contexts" / "shots.parquet")

    def write_transfer(self, texts):
        rows = [example(text, line) for line, text in enumerate(texts, 1)]
        write_examples(rows, ["text"], self.folders.artifacts / "data" / "transfer.parquet")

    def write_labelled(self, texts):
        """Labelled examples; {text: label}."""
        rows = [Example({"text": text}, label=label, source="s", line=line) for line, (text, label) in enumerate(texts.items(), 1)]
        write_examples(rows, ["text"], self.folders.artifacts / "data" / "demonstrations.parquet")

    def params(self):
        free = "completion" in self.task
        data = {
            "sources": {"s": {"path": "x.csv", "completion": "answer"}},
            "demonstrations": {"source": "s", "per_label": 2},
            "transfer": {"source": "s"},
            "evaluation": {"e": {"source": "s", "domain": "in"}},
        }
        baseline = {"prompts": "models/tiny", "contexts": "each"} if free else {"prompts": "targets/t", "contexts": "ensemble"}
        teachers = {"few": {"model": "models/tiny", "contexts": "shots", **self.teacher}}
        if not free:
            teachers["zero"] = {"model": "models/tiny", "contexts": "shots"}
        return parse_params(
            {
                "task": self.task,
                "models": {"tiny": {"path": "models/tiny"}},
                "data": data,
                "contexts": {"shots": {"demonstrations": 1}},
                "teachers": teachers,
                "targets": {} if free else {"t": {"teachers": {"zero": 1.0}}},
                "baselines": {"b": baseline},
                "evaluation": {"reference": "b"},
                "runtime": self.runtime,
            }
        )

    def capture(self):
        """Run the stage as DVC does: its output folder is emptied first."""
        shutil.rmtree(self.output, ignore_errors=True)
        capture("few", self.params(), self.folders)
        return read_cache(self.output)

    def scored(self):
        """The prompt of every row that an engine has scored, with repetitions, from the store's parts."""
        parts = sorted(self.folders.work.glob("scores/*/part-*.parquet"))
        return [key for part in parts for key in pl.read_parquet(part, columns=["prompt_sha"])["prompt_sha"]]

    def metrics(self):
        return (self.folders.metrics / "fidelity" / "few.json").read_bytes()

    def bytes(self):
        """The cache and its tracked metrics."""
        return {file.name: file.read_bytes() for file in sorted(self.output.iterdir())} | {"fidelity": self.metrics()}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(scorer, "ROWS_PER_PART", 4)
    monkeypatch.setattr(cache_folder, "MOST_ROWS", 13)
    monkeypatch.setattr(engines, "LARGEST_BUDGET", 64)


@pytest.fixture
def world(tmp_path, model_folder, small_parts):
    return World(tmp_path / "one", model_folder("llama"))


@pytest.fixture
def other(tmp_path, model_folder, small_parts):
    return World(tmp_path / "two", model_folder("llama"))
