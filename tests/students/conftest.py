"""A project after its targets: random models, a transfer set, demonstrations, a target set, caches that plain transformers wrote."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.cache.encodings import columns_of, encode
from pipeline.cache.folder import cache_manifest, described_task, write_cache
from pipeline.files import Folders, sha256_json, write_json
from pipeline.models.folders import load_model, load_tokenizer, tokenizer_sha256
from pipeline.params import CacheParams, Params
from pipeline.schema import SCORES, TARGETS, Context, Example, write_examples, write_table
from pipeline.students.train import train_student, tune_teacher
from pipeline.task import Task, TaskTokens

TEXTS = [
    "a warm film", "a dull, lifeless mess", "the plot goes nowhere", "I loved every minute of it", "strange little picture",
    "the actors seem bored and so was I", "funny", "terrible service, cold food, late", "every minute of this", "late",
]  # fmt: skip
GOLD = [("warm and funny", "positive"), ("bored", "negative"), ("I loved this little film", "positive"), ("cold mess", "negative")]
TEMPLATE = "Review: {text}\nSentiment:"
LABELS = {"template": TEMPLATE, "verbalisers": {"negative": " bad", "positive": " good"}}
FREE = {"template": TEMPLATE, "completion": {"max_tokens": 6}}
FULL = CacheParams(encoding="full", resolution_nats=None, hidden_layers=(1, -1))
CONTEXTS = [
    Context("few/0", "", (({"text": "a warm film"}, "positive"),)),
    Context("few/1", "Say it.", (({"text": "bored"}, "negative"), ({"text": "cold"}, "negative"))),
]


@dataclass
class Project:
    """The folders, and what the stages are asked for."""

    root: Path
    task_params: dict
    examples: list[Example] = field(default_factory=lambda: [Example({"text": text}, source="s", line=n) for n, text in enumerate(TEXTS)])
    contexts: list[Context] = field(default_factory=lambda: list(CONTEXTS))

    def __post_init__(self):
        self.folders, self.artifacts = Folders.here(self.root), self.root / "artifacts"
        self.task = self.params().task
        if self.task.completion is not None:
            self.contexts = [Context("few/0", "", (({"text": "a warm film"}, "a good one"),)), Context("few/1", "Say it.")]
        self.write_examples("transfer", self.examples)
        self.write_examples("demonstrations", [Example({"text": text}, label, source="s", line=n) for n, (text, label) in enumerate(GOLD)])
        if self.task.completion is None:
            self.write_targets()

    def write_examples(self, name, examples):
        write_examples(examples, ["text"], self.artifacts / "data" / f"{name}.parquet")

    def write_targets(self, probabilities=None, examples=None):
        """A target set of the labels, and pointers to the caches that there are."""
        folder, examples = self.artifacts / "targets" / "mix", self.examples if examples is None else examples
        count = len(self.examples) + 1
        shares = probabilities or [[1 - n / count, n / count] for n in range(1, count)]
        rows = [{"example_id": e.example_id, "probabilities": p, "agreement": 1.0} for e, p in zip(examples, shares, strict=False)]
        write_table(pa.Table.from_pylist(rows, TARGETS), folder / "targets.parquet")
        write_json({**LABELS, "labels": ["negative", "positive"]}, folder / "calibration.json")
        caches = [path.parent for path in self.artifacts.glob("teachers/*/manifest.json")]
        write_json({cache.name: {"manifest_sha256": sha256_json(cache_manifest(cache))} for cache in caches}, folder / "caches.json")

    @torch.no_grad()
    def write_cache(self, name="few", params=FULL, teacher="models/large", model=None):
        """A teacher's cache: every context × example, each by its own plain forward pass; `reader` reads the inputs themselves."""
        folder, task = self.artifacts / teacher, Task(self.task)
        if name == "reader":
            task = task.of_input_tokens()
        tokenizer, model = load_tokenizer(folder), model or load_model(folder)
        tokens, contexts = TaskTokens(task, tokenizer), [Context("none")] if name == "reader" else self.contexts
        examples, rows, logits, states = [*self.examples, Example({"text": "N/A N/A"})], [], [], []
        for context in contexts:
            for example, prompt in zip(examples, tokens.prompts(context, examples), strict=True):
                answer = prompt.answer if prompt.answer is not None else self._generated(model, tokenizer, prompt.ids)
                kept, found = self._forward(model, [*prompt.ids, *answer], len(prompt.ids) - 1, max(1, len(answer)), params.hidden_layers)
                logits.append(found)
                states.append(kept)
                rows.append(
                    {
                        "context_id": context.context_id,
                        "example_id": example.example_id,
                        "prompt_sha": prompt.prompt_sha,
                        "prompt_tokens": len(prompt.ids),
                        "label_logprobs": [],
                        "label_bounds": [],
                        "completion_ids": list(answer),
                        "completion_logprobs": [],
                    }
                )
        positions = np.array([len(found) for found in logits])
        uniforms = torch.rand(int(positions.sum()), generator=torch.Generator().manual_seed(0))
        table = pa.Table.from_pylist(rows, pa.schema([SCORES.field(key) for key in rows[0]]))
        for column, values in columns_of(encode(torch.cat(logits), params, uniforms, torch.cat(states)), positions).items():
            table = table.append_column(SCORES.field(column), values)
        about = {
            "teacher": name,
            "model": teacher,
            "tokenizer_sha256": tokenizer_sha256(folder),
            "identity": {},
            "cache": params.model_dump(mode="json"),
            "task": described_task(task),
            "labels": list(task.labels),
            "contexts": [{"context_id": context.context_id, "name": context.name, "tokens": 1} for context in contexts],
            "content_free": [examples[-1].example_id],
            "engines": [],
        }
        write_cache(self.artifacts / "teachers" / name, [table.select(SCORES.names)], about)

    def _generated(self, model, tokenizer, ids):
        """The greedy answer; none if answers are labels."""
        answer = []
        while self.task.completion is not None and len(answer) < 6 and "\n" not in tokenizer.decode(answer):
            answer.append(int(model(torch.tensor([[*ids, *answer]])).logits[0, -1].argmax()))
        return answer

    def _forward(self, model, ids, first, positions, layers):
        """States [P, layers · H] and logits [P, V] from position `first` on."""
        kept = {}
        hooks = [
            model.model.layers[layer].register_forward_hook(
                lambda _module, _args, out, layer=layer: kept.update({layer: out[0] if isinstance(out, tuple) else out})
            )
            for layer in layers
        ]
        logits = model(torch.tensor([ids])).logits[0]
        for hook in hooks:
            hook.remove()
        here = slice(first, first + positions)
        empty = torch.zeros(positions, 0)
        return torch.cat([empty, *(kept[layer].reshape(len(ids), -1)[here] for layer in layers)], -1), logits[here]

    def params(self, students=None, tuned=None, rounds=None, never_held_back=()):
        free = "completion" in self.task_params
        cache = FULL.model_dump(mode="json") | {"temperatures": [2.0]}
        return Params.model_validate(
            {
                "task": self.task_params,
                "models": {"tiny": {"path": "tiny"}, "large": {"path": "large"}, "other": {"path": "other"}},
                "data": {
                    "sources": {
                        "s": {"path": "s.jsonl", "completion": "answer" if free else None},
                        "p": {"path": "p.jsonl", "label": None},
                    },
                    "demonstrations": {"source": "s", "per_label": 2},
                    "transfer": {"source": "s"},
                    "pool": {"source": "p"} if rounds else None,
                    "never_held_back": never_held_back,
                    "evaluation": {"e": {"source": "s", "domain": "in"}},
                },
                "contexts": {"few": {"demonstrations": 1}},
                "tuned": {
                    name: {"base": "models/tiny", "steps": 12, "batch_size": 4, "learning_rate": 1e-3} | one
                    for name, one in (tuned or {}).items()
                },
                "teachers": {
                    "few": {"model": "models/large", "contexts": "few", "cache": cache},
                    "reader": {"model": "models/large", "contexts": "few", "scores": "input_tokens", "cache": cache},
                },
                "targets": {} if free else {"mix": {"teachers": {"few": 1.0}, "auxiliary_caches": ["few", "reader"]}},
                "rounds": rounds or {},
                "students": {name: self.student(**one) for name, one in (students or {}).items()},
                "baselines": {
                    "b": {"prompts": "teachers/few", "contexts": "each"} if free else {"prompts": "targets/mix", "contexts": "ensemble"}
                },
                "evaluation": {"reference": "b"},
                "runtime": {"threads": 1},
            }
        )

    def student(self, **changes):
        learn_from = "teachers/few" if "completion" in self.task_params else "targets/mix"
        usual = {"base": "models/tiny", "learn_from": learn_from, "held_back": 0.0, "steps": 12, "batch_size": 4, "learning_rate": 1e-3}
        return usual | changes

    def train(self, name="cd", **changes):
        train_student(name, self.params({name: changes}), self.folders)

    def tune(self, name="tuned", **changes):
        tune_teacher(name, self.params(tuned={name: changes}), self.folders)

    def output(self, name="cd"):
        return self.artifacts / "students" / name

    def weights(self, name="cd"):
        return (self.output(name) / "model.safetensors").read_bytes()

    def json(self, name):
        return json.loads((self.root / name).read_text(encoding="utf-8"))

    def manifest(self, name="cd"):
        return json.loads((self.output(name) / "manifest.json").read_text(encoding="utf-8"))

    def curve(self, name="cd"):
        header, *lines = (self.root / f"metrics/curves/{name}.csv").read_text(encoding="utf-8").splitlines()
        return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]

    def losses(self, name="cd"):
        return [float(row["loss"]) for row in self.curve(name)]

    def files(self, *folders):
        """The bytes of all files that DVC tracks."""
        found = folders or ("artifacts/students", "metrics/train", "metrics/curves")
        return {str(p.relative_to(self.root)): p.read_bytes() for f in found for p in sorted((self.root / f).rglob("*")) if p.is_file()}

    def checkpoints(self):
        return sorted((self.root / ".work").rglob("*.safetensors"))


@pytest.fixture(scope="session")
def written_caches(tmp_path_factory):
    """The folder of caches that a project has written; others take copies, since a cache depends on the teacher and the task alone."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def make_project(tmp_path, model_folder, monkeypatch, written_caches):
    """`make_project("name", base=model_folder("gpt2"), free=True, caches=…)`."""
    monkeypatch.delenv("SHOTLESS_WORK", raising=False)

    def make(name="one", base=None, free=False, caches=()):
        root = tmp_path / name
        for model, folder in {"tiny": base or model_folder("llama"), "large": model_folder("llama", seed=1)}.items():
            shutil.copytree(folder, root / "artifacts" / "models" / model)
        project = Project(root, FREE if free else LABELS)
        for cache in caches:
            here, kept = project.artifacts / "teachers" / cache, written_caches / f"{'free' if free else 'labels'}-{cache}"
            if not kept.exists():
                project.write_cache(cache)
                shutil.copytree(here, kept)
            elif not here.exists():
                shutil.copytree(kept, here)
        if caches and not free:
            project.write_targets()
        return project

    return make
