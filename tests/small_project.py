"""A project small enough to be run whole in a test: two local files, a tiny model, one teacher, one target set, one student."""

import json
import shutil
from pathlib import Path

from ruamel.yaml import YAML

FILMS = [
    "a warm film",
    "a dull, lifeless mess",
    "the plot goes nowhere",
    "I loved every minute",
    "strange little picture",
    "so bored",
    "funny",
]
OLD = [f"{film} and {other}" for film in FILMS for other in FILMS[:6]]
TASK = {"template": "Review: {text}\nSentiment:", "verbalisers": {"negative": " bad", "positive": " good"}}


def source(path, labelled):
    return {"path": path} | ({} if labelled else {"label": None})


def small_params():
    return {
        "task": TASK,
        "models": {"tiny": {"path": "mine/model"}},
        "data": {
            "sources": {"pile": source("mine/pile.jsonl", False), "gold": source("mine/gold.jsonl", True)},
            "demonstrations": {"source": "gold", "per_label": 1},
            "transfer": {"source": "pile"},
            "evaluation": {"test": {"source": "gold", "domain": "in", "per_label": 1}},
        },
        "contexts": {"orders": {"demonstrations": 2, "count": 2}},
        "teachers": {"few_shot": {"model": "models/tiny", "contexts": "orders", "cache": {"top_k": 4}}},
        "targets": {"few_shot": {"teachers": {"few_shot": 1.0}}},
        "students": {"cd": {"base": "models/tiny", "learn_from": "targets/few_shot", "steps": 3, "learning_rate": 1e-3}},
        "baselines": {"teacher": {"prompts": "targets/few_shot", "contexts": "ensemble"}},
        "evaluation": {"reference": "teacher"},
        "monitor": {"permutations": 699},
        "runtime": {"threads": 1},
    }


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def make_project(folder, model):
    """The files of a user and their params.yaml in `folder`; nothing is run."""
    shutil.copytree(model, folder / "mine" / "model")
    write_lines(folder / "mine" / "pile.jsonl", [{"text": text} for text in OLD])
    gold = ["terrible food", "late service once more", "great", "a great, great minute here"]
    write_lines(folder / "mine" / "gold.jsonl", [{"text": t, "label": ("negative", "positive")[n // 2]} for n, t in enumerate(gold)])
    write_params(folder, small_params())


def write_params(folder: Path, raw) -> None:
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(raw, file)
