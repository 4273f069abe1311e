"""Every param that a stage reads is tracked for it in dvc.yaml: each stage runs on params that record what is read of them."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from pydantic import BaseModel
from small_project import OLD, TASK, write_lines

from pipeline.evaluation import cost
from pipeline.files import read_json
from pipeline.params import Params, parse_params, read_yaml, resolve, write_yaml

Reads = set[tuple[str, ...]]


PLACES: dict[int, tuple[BaseModel, tuple[str, ...], Reads]] = {}
"""id of a recording block → itself, so that the id stays its own, its path, and where its reads are noted."""


def read_of(block: Any, name: str) -> Any:
    """An attribute of a recording block; keys are noted, and a call that looks at all keys notes the block."""
    value = object.__getattribute__(block, name)
    if id(block) not in PLACES:  # a copy
        return value
    _, path, reads = PLACES[id(block)]
    if name in type(block).model_fields:
        return recorded(value, (*path, name), reads)
    if name == "context_models":  # tracked as what it comes to, not as what it is made from
        reads.add((*path, name))
        return object.__getattribute__(type(block).__base__.model_validate(block.__dict__), name)
    if name == "model_dump":

        def dump(exclude: Any = None, **options: Any) -> Any:
            reads.update((*path, key) for key in type(block).model_fields if key not in (exclude or ()))
            return value(exclude=exclude, **options)

        return dump
    if name in {"model_dump_json", "model_copy", "__eq__"}:
        reads.add(path)
    return value


@cache
def recording(kind: type[BaseModel]) -> type[BaseModel]:
    """A subclass whose instances note what is read of them."""
    same = {"__hash__": object.__hash__, "__eq__": lambda self, other: self.__dict__ == getattr(other, "__dict__", None)}
    return type(f"Recording{kind.__name__}", (kind,), {"__module__": __name__, "__getattribute__": read_of, **same})


class RecordedMap(Mapping[str, Any]):
    """A map of entries; to ask for its names is to read all of it."""

    def __init__(self, value: Mapping[str, Any], path: tuple[str, ...], reads: Reads) -> None:
        self._value, self._path, self._reads = value, path, reads

    def __getitem__(self, name: str) -> Any:
        return recorded(self._value[name], (*self._path, name), self._reads)

    def __contains__(self, name: object) -> bool:
        return name in self._value

    def __iter__(self) -> Iterator[str]:
        self._reads.add(self._path)
        return iter(self._value)

    def __len__(self) -> int:
        self._reads.add(self._path)
        return len(self._value)


def recorded(value: Any, path: tuple[str, ...], reads: Reads) -> Any:
    if isinstance(value, BaseModel):
        block = recording(type(value)).model_construct(**value.__dict__)
        PLACES[id(block)] = (block, path, reads)
        return block
    if isinstance(value, Mapping) and any(isinstance(entry, BaseModel) for entry in value.values()):
        return RecordedMap(value, path, reads)
    reads.add(path)
    return value


def test_the_recorder_notes_what_is_read_and_nothing_else(raw_params):
    params, reads = parse_params(raw_params), set[tuple[str, ...]]()
    record = recorded(params, (), reads)
    assert isinstance(record, Params)
    assert record.students["cd"].learning_rate == params.students["cd"].learning_rate
    assert reads == {("students", "cd", "learning_rate")}
    reads.clear()
    assert record.task.labels == ("negative", "positive")
    assert ("task", "verbalisers") in reads
    assert ("task", "template") not in reads
    reads.clear()
    assert list(record.teachers) == list(params.teachers)
    assert record.data.near_copy == 0.7
    assert reads == {("teachers",), ("data", "near_copy")}
    reads.clear()
    assert record.students["cd"].model_dump(exclude={"seed"}) == params.students["cd"].model_dump(exclude={"seed"})
    assert {("students", "cd", "steps"), ("students", "cd", "base")} <= reads
    assert ("students", "cd", "seed") not in reads
    reads.clear()
    assert record.students["cd"].model_copy(update={"seed": 1}).seed == 1
    assert reads == {("students", "cd")}


LEARNT = {"base": "models/tiny", "steps": 2, "batch_size": 4, "learning_rate": 1e-3}
SHARED: dict[str, Any] = {
    "models": {"tiny": {"path": "my/model"}},
    "data": {
        "sources": {
            "pile": {"path": "my/pile.jsonl", "label": None},
            "gold": {"path": "my/gold.jsonl", "slices": {"kind": "kind"}},
            "test": {"path": "my/test.jsonl", "slices": {"kind": "kind"}},
        },
        "demonstrations": {"source": "gold", "per_label": 2},
        "transfer": {"source": "pile", "limit": 12},
        "evaluation": {"test": {"source": "test", "domain": "in"}},
    },
    "runtime": {"threads": 1},
}
LABELS = SHARED | {
    "task": TASK,
    "data": SHARED["data"] | {"pool": {"source": "pile", "limit": 6}},
    "contexts": {"orders": {"demonstrations": 2, "count": 2}, "none": {"demonstrations": 0}},
    "tuned": {"tuned": LEARNT},
    "teachers": {
        "few_shot": {"model": "models/tiny", "contexts": "orders", "cache": {"top_k": 4, "hidden_layers": [-1]}},
        "tuned": {"model": "tuned/tuned", "contexts": "none"},
        "reader": {"model": "models/tiny", "contexts": "none", "scores": "input_tokens", "cache": {"top_k": 4}},
    },
    "targets": {"mix": {"teachers": {"few_shot": 1.0, "tuned": 0.5}, "auxiliary_caches": ["few_shot", "reader"]}},
    "rounds": {"second": {"student": "cd"}},
    "students": {
        "cd": LEARNT
        | {
            "learn_from": "targets/mix",
            "ce_weight": 0.5,
            "seeds": [0, 1],
            "auxiliary": {"few_shot": {"hidden_weight": 0.1}, "reader": {"weight": 0.3}},
        },
        "pbft": LEARNT | {"learn_from": "data/demonstrations.parquet", "layers": "0-2"},
        "small": LEARNT | {"learn_from": "rounds/second", "validation_fraction": 0.3},
    },
    "baselines": {"teacher": {"prompts": "targets/mix", "contexts": "ensemble"}, "each": {"prompts": "targets/mix", "contexts": "each"}},
    "evaluation": {"reference": "teacher", "bootstrap": 50, "cost_examples": 1, "risk_examples": 2},
    "select": {"within_ms": 1e6},
}
FREE = SHARED | {
    "task": {
        "template": "Review: {text}\nJSON:",
        "completion": {"max_tokens": 3, "form": {"keys": {"mood": ["negative", "positive"]}, "label": "mood"}},
    },
    "contexts": {"shown": {"demonstrations": 0, "instruction": 'a warm film {"mood": "positive"}'}},
    "teachers": {"few_shot": {"model": "models/tiny", "contexts": "shown", "cache": {"top_k": 4}}},
    "students": {"cd": LEARNT | {"learn_from": "teachers/few_shot"}},
    "baselines": {"teacher": {"prompts": "teachers/few_shot", "contexts": "each"}, "bare": {"prompts": "models/tiny", "contexts": "each"}},
    "evaluation": {"reference": "teacher", "bootstrap": 50, "cost_examples": 1},
}
BLOCKS = {  # stages in an order in which they can run, each with the map whose entries it has
    "model": "models",
    "source": "data.sources",
    "prepare": "",
    "tune": "tuned",
    "teacher": "teachers",
    "targets": "targets",
    "student": "students",
    "round": "rounds",
    "evaluate": "students",
    "baseline": "baselines",
    "risk": "students",
    "select": "",
    "cost": "",
    "compare": "",
    "report": "",
}


def entries(raw: Mapping[str, Any], block: str) -> list[str]:
    found: Any = raw
    for key in block.split("."):
        found = found.get(key, {}) if key else {"": None}
    return list(found)


def places(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every stage and its entry, in an order in which they can run: students of rounds behind the rounds."""
    order = list(BLOCKS)

    def place(one: tuple[str, str]) -> float:
        late = one[0] == "student" and raw["students"][one[1]]["learn_from"].startswith("rounds/")
        return order.index("round") + 0.5 if late else order.index(one[0])

    return sorted([(stage, name) for stage, block in BLOCKS.items() for name in entries(raw, block)], key=place)


def run_all(folder: Path, raw: dict[str, Any], patch: Callable[[Any, str, Any], None]) -> dict[str, Reads]:
    """Run every stage of a project in this process; stage → what it read."""
    write_yaml(raw, folder / "params.yaml")
    found: dict[str, Reads] = {}
    with contextlib.chdir(folder):
        resolve()
        params = parse_params({key: value for key, value in read_json(Path("artifacts/params.json")).items() if key in Params.model_fields})
        for stage, name in places(raw):
            module = import_module(f"stages.{'evaluate' if stage == 'baseline' else stage}")
            reads = found[f"{stage}@{name}"] = set()
            patch(module, "resolved_params", lambda reads=reads: recorded(params, (), reads))
            module.main(*([name] if name else []))
    return found


@pytest.mark.parametrize("raw", [LABELS, FREE], ids=["labels", "free text"])
@pytest.mark.slow
def test_every_param_that_a_stage_reads_is_tracked(tmp_path, monkeypatch, model_folder, raw):
    (tmp_path / "my").mkdir()
    shutil.copytree(model_folder("llama"), tmp_path / "my" / "model")
    write_lines(tmp_path / "my" / "pile.jsonl", [{"text": text} for text in OLD])
    words = ["terrible food", "late service once more", "cold and bad", "great", "a great, great minute here", "good service"]
    gold = [{"text": text, "label": ("negative", "positive")[n // 3], "kind": "ab"[n % 2]} for n, text in enumerate(words)]
    write_lines(tmp_path / "my" / "gold.jsonl", gold)
    write_lines(tmp_path / "my" / "test.jsonl", [{**row, "text": f"my {row['text']}, said {n}"} for n, row in enumerate(gold)])
    monkeypatch.setattr(cost, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))  # in this process
    monkeypatch.setenv("SHOTLESS_WORK", str(tmp_path / ".work"))
    found = run_all(tmp_path, raw, monkeypatch.setattr)
    stages = read_yaml(PROJECT / "dvc.yaml")["stages"]
    untracked = {}
    for place, reads in found.items():
        stage, _, name = place.partition("@")
        body = stages[stage].get("do", stages[stage])
        tracked = [tuple(key.replace("${key}", name).split(".")) for file in body["params"] for keys in file.values() for key in keys]
        tracked.append(("runtime",))
        loose = sorted(".".join(path) for path in reads if not any(path[: len(key)] == key for key in tracked))
        if loose:
            untracked[place] = loose
    assert not untracked, json.dumps(untracked, indent=1)
