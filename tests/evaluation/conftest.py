"""A project with two models, their prompts and calibrations, a student of two seeds and two evaluation sets, all of it tiny."""

import copy
import functools
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.files import Folders, read_json, write_json, write_manifest
from pipeline.models.folders import load_model, load_tokenizer
from pipeline.models.trained import about_trained
from pipeline.params import parse_params
from pipeline.schema import Context, Example, write_contexts, write_examples
from pipeline.task import Task, TaskTokens
from pipeline.teachers.capture import capture
from pipeline.teachers.scorer import Scorer

TEMPLATE = "Review: {text}\nSentiment:"
VERBALISERS = {"positive": " good", "mixed": " so-so", "negative": " bad"}  # the second has several tokens
LABELS = sorted(VERBALISERS)
SHOTS = [
    Context("shots/0", demonstrations=(({"text": "a warm film"}, "positive"),)),
    Context("shots/1", demonstrations=(({"text": "bored"}, "negative"), ({"text": "I loved it"}, "positive"))),
]
NONE = Context("none/0")
PREFIXES = {
    "shots/0": "Review: a warm film\nSentiment: good\n\n",
    "shots/1": "Review: bored\nSentiment: bad\n\nReview: I loved it\nSentiment: good\n\n",
    "none/0": "",
}
SETS = {  # one text is in both
    "near": [("I loved every minute", "positive"), ("the actors seem bored", "negative"), ("so-so", "mixed"), ("a film", "mixed")],
    "far": [("cold food, late service", "negative"), ("a film", "positive"), ("great", "positive")],
}
SEEDS = (4, 7)
CALIBRATIONS: dict[str, dict[str, Any]] = {
    "few": {"average": "probability", "scales": [1.0], "teachers": {"few": 1.0}, "by_source": {}},
    "mix": {"average": "probability", "scales": [1.4], "teachers": {"few": 0.75, "zero": 0.25}, "by_source": {}},
    "by_source": {"average": "log_probability", "scales": [1.0], "teachers": {"zero": 1.0}, "by_source": {"far": [[2.0, -1.0, -1.0]]}},
}
TEACHERS = {"few": ("models/first", SHOTS), "zero": ("models/second", [NONE])}


def offsets(number: int) -> list[float]:
    """Made-up offsets of a target set's context, in nats."""
    return [0.3 * number + 0.1, -0.2, 0.1 - 0.3 * number]


def raw_params(shipped: dict[str, Any]) -> dict[str, Any]:
    """The shipped params with this file's task, models, teachers, targets, students and baselines."""
    model, source = next(iter(shipped["models"].values())), shipped["data"]["demonstrations"]["source"]
    student = {"base": "models/first", "learn_from": "targets/mix", "steps": 2, "learning_rate": 1e-3}
    return copy.deepcopy(
        shipped
        | {
            "task": {"template": TEMPLATE, "verbalisers": VERBALISERS},
            "models": {"first": model, "second": model},
            "data": shipped["data"] | {"evaluation": {name: {"source": source, "domain": "in", "per_label": 4} for name in SETS}},
            "contexts": {"shots": {"demonstrations": 2, "count": 2}, "none": {"demonstrations": 0}},
            "tuned": {},
            "teachers": {"few": {"model": "models/first", "contexts": "shots"}, "zero": {"model": "models/second", "contexts": "none"}},
            "targets": {name: {"teachers": entry["teachers"]} for name, entry in CALIBRATIONS.items()},
            "students": {"cd": student, "several": student | {"seeds": list(SEEDS)}},
            "baselines": {
                "icl": {"prompts": "targets/few", "contexts": "each"},
                "icl_mix": {"prompts": "targets/mix", "contexts": "each"},
                "icl_source": {"prompts": "targets/by_source", "contexts": "each"},
                "teacher": {"prompts": "targets/mix", "contexts": "ensemble"},
            },
            "evaluation": {"reference": "teacher", "bootstrap": 50, "seed": 3, "cost_examples": 2},
            "runtime": {"threads": 1},
        }
    )


def softmax(values) -> np.ndarray:
    return np.exp(values) / np.exp(values).sum()


@functools.cache
def loaded(folder):
    return load_model(folder)


class World:
    """An artifacts folder with the above, and answers from the definition: full prompts through the plain model."""

    labels, sets, seeds, calibrations = LABELS, SETS, SEEDS, CALIBRATIONS
    offsets, softmax = staticmethod(offsets), staticmethod(softmax)

    def __init__(self, root, model_folder, shipped, tokenizer):
        self.tokenizer = tokenizer
        self.root, self.folders, self.raw = root, Folders(root / "artifacts", root / "metrics", root / "work"), raw_params(shipped)
        self.artifacts, self.metrics, self.model_folder = self.folders.artifacts, self.folders.metrics, model_folder
        for seed, name in enumerate(("first", "second")):
            shutil.copytree(model_folder("llama", seed=seed), self.artifacts / "models" / name)
        for name, pairs in SETS.items():
            examples = [Example({"text": text}, label, source=name, line=n) for n, (text, label) in enumerate(pairs, 1)]
            write_examples(examples, ("text",), self.artifacts / "data" / "evaluation" / f"{name}.parquet")
        write_contexts(SHOTS, self.artifacts / "data" / "contexts" / "shots.parquet")
        write_contexts([NONE], self.artifacts / "data" / "contexts" / "none.parquet")
        self.train("cd", 4)
        self.train("several", 4)
        self.train("several", 7, "seeds/7")
        for name, entry in CALIBRATIONS.items():
            self.calibrate(name, entry)

    @property
    def params(self):
        return parse_params(self.raw)

    def train(self, name, seed, place="", task=None):
        """Put a random model in a student's folder, with the manifest that training writes."""
        folder = self.artifacts / "students" / name / place
        shutil.copytree(self.model_folder("llama", seed=seed), folder, dirs_exist_ok=True)
        tokens = TaskTokens(Task(task or self.params.task), load_tokenizer(folder))
        write_manifest(folder, about_trained(name, tokens, {}), [file.name for file in folder.iterdir() if file.is_file()])

    def answer_freely(self):
        """The same project with answers in free text: a student of two seeds, a teacher in two contexts, a model as it came."""
        form = {"keys": {"sentiment": ["negative", "positive"], "because": []}, "label": "sentiment"}
        student = {"base": "models/first", "learn_from": "teachers/few", "steps": 2, "learning_rate": 1e-3, "seeds": list(SEEDS)}
        self.raw |= {
            "task": {"template": "Review: {text}\nJSON:", "completion": {"max_tokens": 6, "stop": ["}"], "form": form}},
            "targets": {},
            "students": {"several": student},
            "baselines": {
                "teacher": {"prompts": "teachers/few", "contexts": "each"},
                "untouched": {"prompts": "models/second", "contexts": "each"},
            },
        }
        for source in self.raw["data"]["sources"].values():
            source["completion"] = "answer"
        self.train("several", 4)
        self.train("several", 7, "seeds/7")

    def calibrate(self, name, entry):
        """Write the calibration.json of a target set."""
        contexts = [
            {"teacher": teacher, "name": context.name, "context_id": context.context_id, "weight": weight / len(TEACHERS[teacher][1])}
            for teacher, weight in entry["teachers"].items()
            for context in TEACHERS[teacher][1]
        ]
        described = {
            "targets": name,
            **entry,
            "bias": [0.2, -0.1, -0.1] if name == "mix" else [0.0, 0.0, 0.0],
            "teachers": {teacher: self.teacher(teacher) for teacher in entry["teachers"]},
            "contexts": [
                context | {"voter": 0, "calibration": "batch_log", "offsets": offsets(number)} for number, context in enumerate(contexts)
            ],
        }
        write_json(described, self.artifacts / "targets" / name / "calibration.json")

    def capture(self, name):
        """Run a teacher's stage on the texts of the set "near"."""
        path = self.artifacts / "data" / "transfer.parquet"
        write_examples([], ("text",), self.artifacts / "data" / "demonstrations.parquet")
        write_examples([Example({"text": text}, source="near", line=1) for text, _ in SETS["near"]], ("text",), path)
        capture(name, self.params, self.folders)

    def teacher(self, name):
        """What a target set, or a cache's manifest, says of a teacher."""
        model, contexts = TEACHERS[name]
        identity = Scorer(self.artifacts / model, Task(self.params.task), work=None).identity
        listed = [{"name": context.name, "context_id": context.context_id, "tokens": 1} for context in contexts]
        return {"model": model, "contexts": listed, "dtype": "float32", "identity": identity}

    def metric(self, kind, name):
        return read_json(self.metrics / kind / f"{name}.json")

    def scores(self, folder, context, text) -> np.ndarray:
        """Log-probabilities of the labels' tokens behind one full prompt, normalised over the labels: [L]."""
        model, prompt = loaded(folder), self.tokenizer(PREFIXES[context] + TEMPLATE.format(text=text)).input_ids
        found = []
        for label in LABELS:
            ids, total = self.tokenizer(VERBALISERS[label]).input_ids, 0.0
            for place, token in enumerate(ids):
                with torch.no_grad():
                    total += float(model(torch.tensor([prompt + ids[:place]])).logits[0, -1].double().log_softmax(-1)[token])
            found.append(total)
        return np.array(found) - np.log(np.exp(found).sum())

    def answer(self, name, place, text) -> np.ndarray:
        """Label probabilities of a student's folder: [L]."""
        return softmax(self.scores(self.artifacts / "students" / name / place, "none/0", text))


@pytest.fixture
def world(tmp_path, model_folder, raw_params, tokenizer) -> World:
    return World(tmp_path, model_folder, raw_params, tokenizer)
