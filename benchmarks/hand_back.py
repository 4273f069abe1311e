"""`python -m benchmarks.hand_back`, in a project after its run: what handing back costs and gains → benchmarks/results/hand_back.json.

In each round texts arrive that play no role in the run, as many of each evaluation set's source. The student answers with a threshold, a
target set's teachers answer the rest, and the pair is compared with either alone. Then what was handed back joins the transfer set, with
the answers that it got, and the student is trained again. Accuracy is by gold labels, which nothing else sees. Cost is that of the run's
evaluation (`latency_ms`: one text after the other), the pair's is the student's and the teacher's of what is handed back.

The project's own artifacts are read and stay as they are; students, targets and the store are in `.work/hand_back`.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

from benchmarks.machine import about
from pipeline.files import Folders, read_json, write_json
from pipeline.params import Params, load_params
from pipeline.schema import TARGETS, Example, read_examples, read_table, write_examples, write_table
from pipeline.serving import Prediction, Predictor
from pipeline.serving.fallback import Fallback
from pipeline.students.train import train_student

RESULTS = Path("benchmarks/results/hand_back.json")
SEED = 0
SERVED = "served"  # the source of what was handed back, which is never held back: texts that arrive are not all as hard


def main(
    student: str = "cd",
    targets: Annotated[str, typer.Option(help="The target set that texts are handed back to; the student learns it.")] = "mix",
    teacher: Annotated[str, typer.Option(help="The baseline that is this target set's prompts, for its cost.")] = "teacher",
    agree: float = 0.95,
    rounds: int = 3,
    arriving: Annotated[int, typer.Option(help="Texts of each source in a round.")] = 50,
    steps: Annotated[int, typer.Option(help="Of each training.")] = 100,
    threads: int = 1,
    results: Path = RESULTS,
) -> None:
    """Simulate, print, write."""
    params, machine = load_params(), about()
    changed = {
        "runtime": params.runtime.model_copy(update={"threads": threads}),
        "data": params.data.model_copy(update={"never_held_back": (*params.data.never_held_back, SERVED)}),
        "students": {student: params.students[student].model_copy(update={"steps": steps})},
    }
    params, here = params.model_copy(update=changed), Folders.here()
    folders = Folders.here(here.work / "hand_back")
    shutil.rmtree(here.work / "hand_back", ignore_errors=True)
    folders.artifacts.mkdir(parents=True)
    for name in ("data", "targets"):
        shutil.copytree(here.artifacts / name, folders.artifacts / name)
    for name in ("models", "tuned"):
        if (here.artifacts / name).is_dir():
            (folders.artifacts / name).symlink_to((here.artifacts / name).resolve())
    waves, found = arrivals(params, here, rounds, arriving), list[dict[str, Any]]()
    for number, wave in enumerate(waves, 1):
        train_student(student, params, folders)
        predictor = Predictor(folders.artifacts / "students" / student, threads, agree=agree)
        figures, handed = one_round(predictor, Fallback(targets, predictor, params, folders), wave)
        of_student, of_teacher = (read_json(here.metrics / "cost" / f"{name}.json")["latency_ms"] for name in (student, teacher))
        cost = {"student": of_student, "pair": of_student + figures["handed_back"] * of_teacher, "teacher": of_teacher}
        found.append({"round": number, **figures, "latency_ms": cost})
        print(json.dumps(found[-1]), flush=True)
        learn(handed, targets, params, folders)
        write_json({"settings": {"student": student, "agree": agree, "steps": steps}, **machine, "rounds": found}, results)


def arrivals(params: Params, folders: Folders, rounds: int, count: int) -> list[list[Example]]:
    """For each round, `count` labelled texts of each evaluation set's source that are in no role, in a random order."""
    data, fields = folders.artifacts / "data", tuple(params.task.fields)
    files = [data / "demonstrations.parquet", data / "transfer.parquet", *data.glob("evaluation/*.parquet")]
    taken = {example.example_id for file in files for example in read_examples(file, fields)}
    rng, waves = np.random.default_rng(SEED), [list[Example]() for _ in range(rounds)]
    for source in dict.fromkeys(entry.source for entry in params.data.evaluation.values()):
        rows = read_examples(folders.artifacts / "sources" / source / "examples.parquet", fields)
        free = [example for example in rows if example.label is not None and example.example_id not in taken]
        drawn = rng.choice(len(free), (rounds, count), replace=False)
        for wave, places in zip(waves, drawn, strict=True):
            wave += [free[place] for place in places]
    return [[wave[place] for place in rng.permutation(len(wave))] for wave in waves]


def one_round(predictor: Predictor, fallback: Fallback, wave: Sequence[Example]) -> tuple[dict[str, Any], list[tuple[Example, Prediction]]]:
    """Figures of a round's texts, and what was handed back with its answers."""
    inputs, gold = [example.fields for example in wave], [example.label for example in wave]
    own = predictor.predict(inputs)
    pair = fallback.answer(list(zip(inputs, own, strict=True)))
    handed = [place for place, one in enumerate(own) if not one.answered]
    rest = [place for place, one in enumerate(own) if one.answered]
    others = fallback.answer([(inputs[place], Prediction(answered=False)) for place in rest])
    teacher = dict(zip(rest, others, strict=True)) | {place: pair[place] for place in handed}

    def right(answers: Sequence[Prediction], places: Sequence[int]) -> float:
        return sum(answers[place].label == gold[place] for place in places) / max(1, len(places))

    everything, by_teacher = range(len(wave)), [teacher[place] for place in range(len(wave))]
    figures = {
        "texts": len(wave),
        "handed_back": len(handed) / len(wave),
        "agreement_of_answered": sum(own[place].label == teacher[place].label for place in rest) / max(1, len(rest)),
        "accuracy": {"student": right(own, everything), "pair": right(pair, everything), "teacher": right(by_teacher, everything)},
        "accuracy_of_handed_back": {"student": right(own, handed), "teacher": right(by_teacher, handed)},
    }
    return figures, [(wave[place], pair[place]) for place in handed]


def learn(handed: Sequence[tuple[Example, Prediction]], targets: str, params: Params, folders: Folders) -> None:
    """Put what was handed back into the transfer set and the target set; its answers are the targets that it would get there."""
    fields, transfer = tuple(params.task.fields), folders.artifacts / "data" / "transfer.parquet"
    texts = [*read_examples(transfer, fields), *(Example(example.fields, source=SERVED) for example, _ in handed)]
    write_examples(texts, fields, transfer)
    file = folders.artifacts / "targets" / targets / "targets.parquet"
    columns = [
        [example.example_id for example, _ in handed],
        [list((one.probabilities or {}).values()) for _, one in handed],
        [math.nan] * len(handed),  # of teachers with each other: not known here, and students do not ask
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, TARGETS, strict=True)]
    write_table(pa.concat_tables([read_table(file, TARGETS), pa.Table.from_arrays(arrays, schema=TARGETS)]), file)


if __name__ == "__main__":
    typer.run(main)
