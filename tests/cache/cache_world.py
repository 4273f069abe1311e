"""A workspace with a tiny teacher, its contexts and a transfer set, in which `shotless verify` and the teacher's stage can run."""

import shutil
from pathlib import Path

import pyarrow as pa
from ruamel.yaml import YAML

from pipeline.teachers import scorer as scorer_module
from pipeline.files import context_id, example_id
from pipeline.params import load_params
from pipeline.schema import CONTEXTS, examples, write_table
from pipeline.task import Task
from pipeline.teachers.capture import capture

TEACHER = "few_shot"
SHOTS = ["Review: a warm film\nSentiment: positive\n\n", "Review: bored\nSentiment: negative\n\n"]


class Workspace:
    """`folder` is the current one of the test. 2 contexts × (1 input without content + the texts); shards of 8 rows, parts of 4."""

    def __init__(self, folder: Path, raw_params: dict, model_folder: Path, monkeypatch) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("SHOTLESS_WORK", str(folder / "work"))
        monkeypatch.setattr("pipeline.cache.rows.MOST_ROWS", 8)
        monkeypatch.setattr(scorer_module, "ROWS_PER_PART", 4)
        monkeypatch.setattr("pipeline.teachers.batches.LARGEST_BUDGET", 64)
        self.folder, self.raw, self.monkeypatch = folder, raw_params, monkeypatch
        self.raw["runtime"] = {"threads": 1}  # rounding follows the number of threads
        self.raw["teachers"][TEACHER] |= {"dtype": "float32", "cache": {"top_k": 4}}
        self.write_params()
        shutil.copytree(model_folder, self.model)
        self.contexts = folder / "artifacts" / "data" / "contexts" / f"{self.raw['teachers'][TEACHER]['contexts']}.parquet"
        self.transfer = folder / "artifacts" / "data" / "transfer.parquet"
        rows = [
            {"context_id": context_id(text), "name": f"shots/{number}", "text": text, "example_ids": [], "tokens": len(text)}
            for number, text in enumerate(SHOTS)
        ]
        write_table(pa.Table.from_pylist(rows, CONTEXTS), self.contexts)
        self.write_transfer(11)

    @property
    def model(self) -> Path:
        return self.folder / "artifacts" / self.raw["teachers"][TEACHER]["model"]

    @property
    def scores(self) -> Path:
        return self.folder / "artifacts" / "scores" / TEACHER

    @property
    def store(self) -> Path:
        """The folder of the one fingerprint there is."""
        (found,) = (self.folder / "work" / "scores").iterdir()
        return found

    def write_params(self) -> None:
        with (self.folder / "params.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(self.raw, file)

    def write_transfer(self, count: int) -> None:
        texts = [f"text number {number} " + "good " * (number % 7) for number in range(count)]
        rows = [
            {"example_id": example_id({"text": text}), "label": None, "completion": None, "source": "s", "line": n, "text": text}
            for n, text in enumerate(texts, 1)
        ]
        write_table(pa.Table.from_pylist(rows, examples(("text",))), self.transfer)

    def capture(self) -> dict[str, bytes]:
        """Run the stage; the cache's bytes by file name."""
        params = load_params()
        teacher = params.teachers[TEACHER]
        task, work = Task(params.task), self.folder / "work"
        capture(TEACHER, self.model, self.contexts, self.transfer, self.scores, task, teacher.cache, teacher.dtype, work, 1)
        return self.bytes()

    def bytes(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted(self.scores.iterdir())}

    def count_scored(self) -> list[tuple[str, str]]:
        """The keys of rows that reach an engine from now on."""
        scored: list[tuple[str, str]] = []
        original = scorer_module._score_part

        def counting(engine, part, *others):
            scored.extend(part.keys)
            return original(engine, part, *others)

        self.monkeypatch.setattr(scorer_module, "_score_part", counting)
        return scored
