"""A project with two teachers, targets, a student, baselines and evaluation sets, and their answers from the definition: full prompts."""

import copy
import functools
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import PROJECT
from ruamel.yaml import YAML

from pipeline.evaluation import evaluate as evaluate_module
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.predict import predict_baseline, predict_student, read_sets
from pipeline.files import read_json, read_sealed_json
from pipeline.files import context_id, example_id
from pipeline.models.loading import load_model
from pipeline.params import parse_params
from pipeline.schema import CONTEXTS, examples, read_table, write_table
from pipeline.students.runs import Places, train_student
from pipeline.targets.build import build_targets
from pipeline.task import Task
from pipeline.teachers.capture import capture

TEMPLATE = "Review: {text}\nSentiment:"
VERBALISERS = {"negative": " bad", "mixed": " so-so", "positive": " good"}  # the second has several tokens
LABELS = list(VERBALISERS)
SHOTS = ["Review: a warm film\nSentiment: good\n\n", "Review: bored\nSentiment: bad\n\nReview: I loved it\nSentiment: good\n\n"]
CONTEXTS_OF = {"shots": SHOTS, "none": [""]}
TRANSFER = ["a warm and funny film", "a dull, lifeless mess", "funny", "strange little picture", "the plot goes nowhere"]
SETS = {  # one text stands in both
    "near": [("I loved every minute", "positive"), ("the actors seem bored", "negative"), ("so-so", "mixed"), ("a film", "mixed")],
    "far": [("cold food, late service", "negative"), ("a film", "positive"), ("great", "positive")],
}
TIMED = 2


def rows_of(pairs):
    return [
        {"example_id": example_id({"text": text}), "label": label, "source": "s", "line": line, "text": text}
        for line, (text, label) in enumerate(pairs, 1)
    ]


class World:
    """An artifacts folder with two teachers' targets, a student and two evaluation sets, made by the stages' own functions."""

    def __init__(self, root, first, second):
        self.root, self.artifacts, self.metrics, self.work = root, root / "artifacts", root / "metrics", root / "work"
        for name, folder in {"first": first, "second": second}.items():
            shutil.copytree(folder, self.artifacts / "models" / name)
        schema = examples(("text",))
        for name, pairs in SETS.items():
            write_table(pa.Table.from_pylist(rows_of(pairs), schema), self.artifacts / "data" / "evaluation" / f"{name}.parquet")
        transfer = self.artifacts / "data" / "transfer.parquet"
        write_table(pa.Table.from_pylist(rows_of([(text, None) for text in TRANSFER]), schema), transfer)
        for name, texts in CONTEXTS_OF.items():
            rows = [
                {"context_id": context_id(text), "name": f"{name}/{n}", "text": text, "example_ids": [], "tokens": 1}
                for n, text in enumerate(texts)
            ]
            write_table(pa.Table.from_pylist(rows, CONTEXTS), self.artifacts / "data" / "contexts" / f"{name}.parquet")
        params, places = parse_params(raw_params()), Places(self.artifacts, self.metrics, self.work)
        self.task = Task(params.task)
        for name, teacher in params.teachers.items():
            contexts = self.artifacts / "data" / "contexts" / f"{teacher.contexts}.parquet"
            scores = self.artifacts / "scores" / name
            capture(name, self.artifacts / teacher.model, contexts, transfer, scores, self.task, teacher.cache, "float32", self.work, 1)
        texts = read_table(transfer, examples(["text"]))
        for name, target in params.targets.items():
            output, metrics = self.artifacts / "targets" / name, self.metrics / f"{name}.json"
            build_targets(name, target, params.teachers, self.task, texts, self.artifacts / "scores", output, metrics)
        train_student("cd", params.students["cd"], self.task, places, 1)

    def copied(self, root):
        """The same at another place, which a test may spoil."""
        shutil.copytree(self.root, root)
        own = copy.copy(self)
        own.root, own.artifacts, own.metrics, own.work = (root / name for name in ("", "artifacts", "metrics", "work"))
        return own

    def calibration(self, name):
        return read_sealed_json(self.artifacts / "targets" / name / "calibration.json")

    def sets(self):
        return read_sets(self.artifacts / "data" / "evaluation", list(SETS), self.task)

    def student(self, task=None):
        return predict_student("cd", {"": self.artifacts / "students" / "cd"}, task or self.task, self.sets(), self.work, 1)

    def baseline(self, targets, ensemble):
        return predict_baseline("base", self.calibration(targets), ensemble, self.task, self.sets(), self.artifacts, self.work, 1)

    def evaluate(self, name, figures, raw=None, metrics=None):
        """Run the stage with the cost figures of `figures`' subject at hand; measuring anything else fails."""
        parsed = parse_params(raw or raw_params())
        metrics = metrics or self.metrics
        known = {figures["measured"]["subject"]: figures}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate_module, "measure", lambda job, _: copy.deepcopy(known[job.subject]))
            evaluate(name, parsed, self.artifacts, metrics, self.work)
        return read_json(metrics / "eval" / f"{name}.json"), read_json(metrics / "cost" / f"{name}.json")


def raw_params() -> dict[str, Any]:
    """The shipped params with this file's task, models, teachers, targets, student and baselines."""
    shipped = YAML(typ="safe", pure=True).load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    model = next(iter(shipped["models"].values()))
    source = shipped["data"]["demonstrations"]["source"]
    few = {"model": "models/first", "contexts": "shots", "cache": {"top_k": 4}}
    return copy.deepcopy(
        shipped
        | {
            "task": {"template": TEMPLATE, "verbalisers": VERBALISERS},
            "models": {"first": model, "second": model},
            "data": shipped["data"] | {"evaluation": {name: {"source": source, "domain": "in", "per_label": 4} for name in SETS}},
            "contexts": {
                "shots": {"demonstrations": 2, "count": 2, "tokenizer": "models/first"},
                "none": {"demonstrations": 0, "tokenizer": "models/first"},
            },
            "tunings": {},
            "teachers": {
                "few": few,
                "few_second": few | {"model": "models/second"},
                "zero": {"model": "models/second", "contexts": "none", "cache": {"top_k": 4}},
            },
            "targets": {
                "few": {"teachers": {"few": 1.0}, "calibration": "batch", "temperature": 1.5},
                "mix": {"teachers": {"few": 3.0, "zero": 1.0}, "calibration": "contextual", "temperature": 0.7},
                "geometric": {"teachers": {"zero": 1.0, "few": 1.0}, "calibration": "none", "average": "log_probability"},
                "two_models": {"teachers": {"few": 1.0, "few_second": 1.0}, "calibration": "none"},
            },
            "students": {
                "cd": {"base": "models/first", "layers": "0, 2-3", "learn_from": "targets/mix", "steps": 2, "learning_rate": 1e-3},
            },
            "baselines": {
                "icl": {"prompts": "targets/few", "contexts": "each"},
                "icl_mix": {"prompts": "targets/mix", "contexts": "each"},
                "teacher": {"prompts": "targets/mix", "contexts": "ensemble"},
            },
            "evaluation": {"reference": "teacher", "bootstrap": 50, "seed": 3, "cost_examples": TIMED, "cost_demonstrations": []},
            "runtime": {"threads": 1},
        }
    )


def figures_of(subject, **values):
    return {"measured": {"subject": subject, "examples": TIMED}, "latency_ms": 1.5, **values}


def prompt_ids(tokenizer, context, text):
    return tokenizer(context).input_ids + tokenizer(TEMPLATE.format(text=text)).input_ids


@functools.cache
def loaded(folder):
    return load_model(folder)


@torch.no_grad()
def naive_scores(folder, tokenizer, context, text):
    """Log-probabilities of the labels' tokens behind one full prompt, normalised over the labels: [L]."""
    model, prompt, scores = loaded(folder), prompt_ids(tokenizer, context, text), []
    for verbaliser in VERBALISERS.values():
        ids, total = tokenizer(verbaliser).input_ids, 0.0
        for place, token in enumerate(ids):
            total += float(model(torch.tensor([prompt + ids[:place]])).logits[0, -1].double().log_softmax(-1)[token])
        scores.append(total)
    return np.array(scores) - np.log(np.exp(scores).sum())


def naive_calibrated(world, tokenizer, target, folder, context, text):
    """One context's answer to one text, calibrated as the params say, from nothing but full prompts."""
    scored = [naive_scores(folder, tokenizer, context, seen) for seen in {"batch": TRANSFER, "contextual": ["N/A"]}[target["calibration"]]]
    offsets = np.mean(scored, 0) - np.mean(scored)
    p = np.exp((naive_scores(folder, tokenizer, context, text) - offsets) / target["temperature"])
    return p / p.sum()
