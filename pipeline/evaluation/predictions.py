"""A method's predictions on the evaluation sets, as rows from which every number is made.

A student answers with no context, each seed's model by itself. A baseline answers in the contexts of a target set, with the calibration
learnt on the transfer set: each context on its own, or all averaged as the target set averages them. In free text a student, a teacher in
each of its contexts, or a model folder as it came writes answers within the task's own limits. Scores of baselines go through the store, so
baselines that put the same prompts to the same model share them; a student's are not kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import softmax

from pipeline.errors import MismatchError
from pipeline.files import Folders, read_json, read_manifest
from pipeline.models.trained import open_trained
from pipeline.params import CacheParams, Format, Params
from pipeline.schema import ANSWERS, NO_CONTEXT, PREDICTIONS, SLICE, Context, Example, read_contexts, read_examples
from pipeline.targets.calibration import combination_of
from pipeline.task import Task
from pipeline.teachers.engines import LABELS_ONLY
from pipeline.teachers.scorer import Scorer

Sets = Mapping[str, Sequence[Example]]  # evaluation set → its examples


@dataclass(frozen=True)
class Answering:
    """A model that answers for a method, and how."""

    folder: Path
    contexts: tuple[Context, ...] = (NO_CONTEXT,)
    format: Format = "plain"
    dtype: str = "float32"
    run: str | None = None  # its run in the table; None: the name of each context
    work: Path | None = None  # where its scores are kept; None: nowhere
    temperature: float = 1.0  # of a student's probabilities
    identity: Mapping[str, Any] | None = None  # of the scores, which it must still have
    cache: CacheParams = LABELS_ONLY  # what is kept beside the labels' scores

    def scorer(self, task: Task, params: Params) -> Scorer:
        """A scorer of this model. Raises MismatchError if it is not the model that the prompts were calibrated with."""
        asked, threads = replace(task, format=self.format), params.runtime.threads
        scorer = Scorer(self.folder, asked, self.cache, work=self.work, threads=threads, dtype=self.dtype)
        other = [key for key, value in (self.identity or {}).items() if key != "cache" and scorer.identity.get(key) != value]
        if other:
            raise MismatchError(
                f"{self.folder}: not the model that the teacher's scores are of ({', '.join(other)} differs). Run `dvc repro`."
            )
        return scorer


def read_sets(params: Params, folders: Folders) -> dict[str, list[Example]]:
    """The evaluation sets in the params' order, with the slices that their files have."""
    found = {}
    for name in params.data.evaluation:
        path = folders.artifacts / "data" / "evaluation" / f"{name}.parquet"
        columns = pq.read_schema(path).names if path.is_file() else []
        slices = [column.removeprefix(SLICE) for column in columns if column.startswith(SLICE)]
        found[name] = read_examples(path, params.task.fields, slices)
    return found


def models_of(name: str, params: Params, folders: Folders) -> list[Answering]:
    """The models that answer for a student (one for each seed, the first one's first) or a baseline (one for each teacher).

    Raises MismatchError if a student was trained for another task or a context is no longer what it was, CorruptError if a student's folder
    is damaged.
    """
    if name in params.students:
        seeds, folder = params.students[name].seeds or (), folders.artifacts / "students" / name
        runs = {f"seed {seed}": folder / "seeds" / str(seed) if at else folder for at, seed in enumerate(seeds)}
        found = []
        for run, own in (runs if len(seeds) > 1 else {"": folder}).items():
            (trained := open_trained(own)).check_task(params.task)
            found.append(Answering(own, format=trained.task.format, run=run, temperature=trained.temperature))
        return found
    prompts = params.baselines[name].prompts
    if not prompts.startswith(("targets/", "teachers/")):
        return [Answering(folders.artifacts / prompts, format=params.format_of(prompts), run="", work=folders.work)]
    return teachers_of(prompts, folders)


def teachers_of(prompts: str, folders: Folders) -> list[Answering]:
    """The models of `teachers/NAME`, or of `targets/NAME`: one for each teacher, in the order of the target set's contexts.

    Raises MismatchError if a context is no longer what it was.
    """
    if prompts.startswith("teachers/"):
        manifest = read_manifest(folders.artifacts / prompts)
        asked = [(manifest, manifest["contexts"])]
    else:
        calibration = read_calibration(prompts, folders)
        listed = calibration["contexts"]
        asked = [(entry, [one for one in listed if one["teacher"] == teacher]) for teacher, entry in calibration["teachers"].items()]
    found = []
    for teacher, listed in asked:
        contexts, identity = tuple(_context(one, folders) for one in listed), teacher["identity"]
        model = folders.artifacts / teacher["model"]
        found.append(Answering(model, contexts, contexts[0].format, identity["dtype"], work=folders.work, identity=identity))
    return found


def read_calibration(targets: str, folders: Folders) -> dict[str, Any]:
    """What `targets/NAME` says of its prompts: teachers, contexts (teacher by teacher) with weights and offsets, how they are combined."""
    return read_json(folders.artifacts / targets / "calibration.json")


def _context(listed: Mapping[str, Any], folders: Folders) -> Context:
    """A context by its name ("orders/0" of the list "orders"). Raises MismatchError if it is no longer what it was."""
    path = folders.artifacts / "data" / "contexts" / f"{listed['name'].rpartition('/')[0]}.parquet"
    found = {context.name: context for context in read_contexts(path)}.get(listed["name"])
    if found is None or found.context_id != listed["context_id"]:
        raise MismatchError(f"{path}: context {listed['name']!r} is not the one that the teacher answered in. Run `dvc repro`.")
    return found


def predict(name: str, models: Sequence[Answering], params: Params, folders: Folders, sets: Sets) -> pa.Table:
    """`schema.PREDICTIONS` of a student, a run for each seed, or of a target set's prompts: a run for each context, or their ensemble.

    Rows are sets outermost, then runs, then examples. `models` are from `models_of`. Raises MismatchError if one is no longer the model
    that the calibration was learnt with.
    """
    task, examples = Task(params.task), _unique(sets)
    place = {example: row for row, example in enumerate(examples)}
    asked, title = list(examples.values()), f"evaluate {name}"
    each_scored = []
    for model in models:
        with model.scorer(task, params) as scorer:
            each_scored.append(scorer.label_scores(model.contexts, asked, title))
    scored = np.concatenate(each_scored)  # [C, all, L]
    rows = []
    for key, own in sets.items():
        scores = scored[:, [place[example.example_id] for example in own]]  # [C, N, L]
        if name in params.students:
            temperatures = np.array([model.temperature for model in models])[:, None, None]
            runs, each = [model.run for model in models], softmax(scores / temperatures, axis=-1)
        else:
            combination = combination_of(read_calibration(params.baselines[name].prompts, folders), own[0].source)
            runs, each = [context.name for model in models for context in model.contexts], combination.each(scores)
            if params.baselines[name].contexts == "ensemble":
                runs, each = [""], combination.ensemble(scores)[None]
        for run, probabilities in zip(runs, each.astype(np.float32), strict=True):
            for example, values in zip(own, probabilities, strict=True):
                predicted = task.labels[int(values.argmax())]
                rows.append({**_keys(key, run or "", example), "predicted": predicted, "probabilities": values})
    return pa.Table.from_pylist(rows, schema=PREDICTIONS)


def answer(name: str, models: Sequence[Answering], params: Params, sets: Sets) -> pa.Table:
    """`schema.ANSWERS` of a student or baseline: sets outermost, then runs, then examples. `models` are from `models_of`."""
    assert params.task.completion is not None
    # Answers that the data give are what a student learns; here it writes its own.
    writes = params.task.completion.model_copy(update={"source": "generated"})
    task, examples = Task(params.task.model_copy(update={"completion": writes})), list(_unique(sets).values())
    said: dict[str, dict[str, tuple[str, int]]] = {}  # run → example → answer, tokens
    for model in models:
        names = {context.context_id: context.name for context in model.contexts}
        with model.scorer(task, params) as scorer:
            answered = scorer.score(model.contexts, examples, f"evaluate {name}").to_pylist()
        for row in answered:
            run = names[row["context_id"]] if model.run is None else model.run
            text = scorer.tokens.tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
            said.setdefault(run, {})[row["example_id"]] = text, len(row["completion_ids"])
    rows = []
    for key, run, example in ((key, run, example) for key, own in sets.items() for run in said for example in own):
        text, tokens = said[run][example.example_id]
        rows.append({**_keys(key, run, example), "answer": text, "tokens": tokens})
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def _unique(sets: Sets) -> dict[str, Example]:
    """Every example once, by its id. All sets are one request: their batches are filled together."""
    return {example.example_id: example for examples in sets.values() for example in examples}


def _keys(key: str, run: str, example: Example) -> dict[str, Any]:
    return {"set": key, "run": run, "example_id": example.example_id, "label": example.label}
