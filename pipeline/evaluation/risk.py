"""The risks of a distilled student: flips under swaps, gaps between slices, disagreement with the reference.

A student with several seeds is several models. Each is checked by itself: by its own predictions on disk, and its own answers to swapped
texts. Flips are counted over the texts with something to swap (`swaps.py`), with the exact binomial interval: few texts with a name say
little, and the interval shows it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from heapq import nsmallest
from typing import Any, cast

import numpy as np
import polars as pl
from scipy.special import softmax
from scipy.stats import binomtest, chi2_contingency

from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import RIGHT, Floats, Json, Scores, probabilities_of, rounded
from pipeline.evaluation.predictions import Sets, models_of, read_sets
from pipeline.evaluation.swaps import SWAPS, swap_fields
from pipeline.files import Folders, write_json
from pipeline.params import Params, pick
from pipeline.schema import NO_CONTEXT, PREDICTIONS, Example, read_table
from pipeline.task import Task
from pipeline.teachers.scorer import Scorer

Ask = Callable[[Sequence[Example]], Floats]  # examples → the student's label probabilities [N, L]
Answered = tuple[str, Example, Floats]  # evaluation set, example, the student's label probabilities [L] on disk
FLIPS_SHOWN = 5
CONFIDENCE_BINS = 10
SMALLEST_SLICE = 20


def check_risks(name: str, params: Params, folders: Folders) -> None:
    """Write metrics/risk/NAME.json: `student`, `reference`, and the checks of the student's first seed (see `check_run`).

    If there are several seeds, `run` says which this is, and `runs` has the same checks of each of the others.
    """
    pick("students", params.students, name)
    document: Json = {"student": name}
    if params.task.completion is not None:
        document["skipped"] = "answers are free text, and the checks compare probabilities of labels"
    else:
        task, reference, sets = Task(params.task), params.evaluation.reference, read_sets(params, folders)
        tables = [read_table(folders.artifacts / "predictions" / f"{method}.parquet", PREDICTIONS) for method in (name, reference)]
        ours, theirs = (metrics.frames(table, task.labels) for table in tables)
        checked = {}
        for model in models_of(name, params, folders):
            ask, run = partial(_ask, model.scorer(task, params), model.temperature, f"risk {name} {model.run}".rstrip()), model.run or ""
            own = {key: frame.filter(pl.col("run") == run) for key, frame in ours.items()}
            checked[run] = check_run(own, theirs, sets, ask, params)
        first, *others = checked
        document |= {"reference": reference} | ({"run": first} if others else {}) | checked[first]
        document |= {"runs": {run: checked[run] for run in others}} if others else {}
    write_json(document, folders.metrics / "risk" / f"{name}.json")


def _ask(scorer: Scorer, temperature: float, title: str, examples: Sequence[Example]) -> Floats:
    return softmax(scorer.label_scores([NO_CONTEXT], examples, title)[0] / temperature, axis=-1)


def check_run(ours: Scores, theirs: Scores, sets: Sets, ask: Ask, params: Params) -> Json:
    """`swaps`, `gaps`, `disagreement` of one model. `ours[set]` are its predictions, `theirs[set]` the reference's.

    Raises CorruptError if an example is not answered once.
    """
    labels, domains = params.task.labels, {key: entry.domain for key, entry in params.data.evaluation.items()}
    scores = [{key: metrics.example_scores(frame, key) for key, frame in predictions.items()} for predictions in (ours, theirs)]
    members = {key: metrics.membership(examples) for key, examples in sets.items()}
    answers = {key: dict(zip(frame["example_id"], probabilities_of(frame), strict=True)) for key, frame in ours.items()}
    mine = [(key, example, answers[key][example.example_id]) for key, examples in sets.items() for example in examples]
    return {
        "swaps": rounded(flips(mine, ask, labels, params.evaluation.risk_examples)),
        "gaps": gaps(scores[0], scores[1], members, domains),
        "disagreement": rounded([disagreement(ours, theirs, domains, domain) for domain in ("in", "out") if domain in domains.values()]),
    }


def flips(mine: Sequence[Answered], ask: Ask, labels: Sequence[str], per_set: int) -> list[Json]:
    """For each swap how often the answer flips; at most `per_set` texts of each set are asked again for a swap, drawn by their hash.

    `texts`, `with_swap` (texts with something to swap), `asked`, `flips` with `flip_rate` and `ci95`; `mean_shift` and `largest_shift` are
    absolute changes in the probability of the answer given before; `examples`, flips before the largest shifts. Rates and shifts
    are None if nothing was asked.
    """
    found, drawn = list[Json](), list[list[tuple[Answered, Example]]]()
    for swap in SWAPS:
        pairs = [(before, Example(fields)) for before in mine if (fields := swap_fields(swap, before[1].fields)) is not None]
        by_set = [[pair for pair in pairs if pair[0][0] == name] for name in dict.fromkeys(name for name, _, _ in mine)]
        found.append({"name": swap.name, "what": swap.what, "texts": len(mine), "with_swap": len(pairs)})
        drawn.append([pair for own in by_set for pair in nsmallest(per_set, own, key=lambda pair: pair[1].example_id)])
    after = iter(ask([example for pairs in drawn for _, example in pairs]))
    return [own | _flips_of([(*pair, next(after)) for pair in pairs], labels) for own, pairs in zip(found, drawn, strict=True)]


def _flips_of(rows: Sequence[tuple[Answered, Example, Floats]], labels: Sequence[str]) -> Json:
    """What a swap did: rows are the answer before, the swapped text, and the probabilities after."""
    entries = list[Json]()
    for (name, example, before), swapped, after in rows:
        best, other = int(before.argmax()), int(after.argmax())
        entry: Json = {"set": name, "example_id": example.example_id, "before": dict(example.fields), "after": dict(swapped.fields)}
        entry |= {"label": example.label, "answer_before": labels[best], "answer_after": labels[other]}
        entries.append(entry | {"p_before": float(before[best]), "p_after": float(after[best])})
    flipped = [entry["answer_before"] != entry["answer_after"] for entry in entries]
    shifts = [abs(entry["p_after"] - entry["p_before"]) for entry in entries]
    interval = binomtest(sum(flipped), len(entries)).proportion_ci(0.95, method="exact") if entries else None
    order = sorted(range(len(entries)), key=lambda at: (not flipped[at], -shifts[at], entries[at]["example_id"]))
    return {
        "asked": len(entries),
        "flips": sum(flipped),
        "flip_rate": float(np.mean(flipped)) if entries else None,
        "ci95": [float(interval.low), float(interval.high)] if interval else None,
        "mean_shift": float(np.mean(shifts)) if entries else None,
        "largest_shift": max(shifts, default=None),
        "examples": [entries[at] for at in order[:FLIPS_SHOWN]],
    }


def gaps(student: Scores, reference: Scores, members: Scores, domains: Mapping[str, str]) -> list[Json]:
    """One row for each dimension, domain, and set (None: all of the domain) with at least two slices of `SMALLEST_SLICE` examples.

    `student[set]` and `reference[set]` are from `metrics.example_scores`. A row has `p_value` of the student's right answers, and for
    `student` and `reference` the `lowest` and `highest` slice and their `gap`. Between domains, `domain` is None. A domain's only set
    is not listed again.
    """
    present = [domains[name] for name in student]
    groups: list[dict[tuple[str, str | None, str | None], dict[str, Floats]]] = [{}, {}]
    for scores, own in zip((student, reference), groups, strict=True):
        for key, sample in metrics.slice_rows(scores, members, domains):
            if len(sample) >= SMALLEST_SLICE and (key["set"] is None or present.count(key["domain"]) > 1):
                domain = None if key["dimension"] == "domain" else key["domain"]
                own.setdefault((key["dimension"], domain, key["set"]), {})[key["slice"]] = sample
    return [
        dict(zip(("dimension", "domain", "set"), key, strict=True))
        | {"p_value": homogeneity(list(slices.values()))}
        | rounded({"student": _extremes(slices), "reference": _extremes(groups[1][key])})
        for key, slices in groups[0].items()
        if len(slices) > 1
    ]


def homogeneity(samples: Sequence[Floats]) -> float | None:
    """P-value of the chi-square test that right answers are as frequent in every slice; None if all answers are right, or all wrong.

    A sample has the score, 0 or 1, of each example of a slice.
    """
    right = np.array([sample.sum() for sample in samples])
    wrong = np.array([len(sample) for sample in samples]) - right
    if not right.sum() or not wrong.sum():
        return None
    return float(f"{cast('Any', chi2_contingency(np.stack([right, wrong]))).pvalue:.3g}")


def _extremes(slices: Mapping[str, Floats]) -> Json:
    ends = [{"slice": name, "n": len(sample), "accuracy": float(sample.mean())} for name, sample in slices.items()]
    low, high = (end(ends, key=lambda entry: entry["accuracy"]) for end in (min, max))
    return {"lowest": low, "highest": high, "gap": high["accuracy"] - low["accuracy"]}


def disagreement(ours: Scores, theirs: Scores, domains: Mapping[str, str], domain: str) -> Json:
    """How often student and reference answer differently in a domain: `n`, `share`, and both accuracies by the student's confidence."""
    pairs = [(frame, theirs[name]) for name, frame in ours.items() if domains[name] == domain]
    rows = pl.concat([frame.join(other, on="example_id", suffix="_reference", maintain_order="left") for frame, other in pairs])
    shares = rows.select(
        disagreement=pl.col("predicted") != pl.col("predicted_reference"),
        student_accuracy=RIGHT,
        reference_accuracy=pl.col("predicted_reference") == pl.col("label"),
    )
    values = {name: shares[name].to_numpy() for name in shares.columns}
    bins = metrics.binned(probabilities_of(rows).max(axis=1), CONFIDENCE_BINS, values)
    return {"domain": domain, "n": rows.height, "share": float(values["disagreement"].mean()), "by_student_confidence": bins}
