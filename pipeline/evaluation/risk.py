"""The risks of a distilled student: flips under swaps, gaps between slices, disagreement with the reference, words behind its answers.

A student with several seeds is several models. Each is checked by itself: by its own predictions on disk, and its own answers to swapped
and shortened texts.

Flips are counted over the texts with something to swap (`swaps.py`), with the exact binomial interval: few texts with a name say little,
and the interval shows it. For the words behind an answer, each word is left out in turn, and the log-odds that the answer loses are the
word's weight. Leave-one-out (Li et al. 2016, 1612.08220) asks the student itself, whatever its architecture, and needs no gradient. Its
trade-off: words that say the same twice hide each other.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.special import logit
from scipy.stats import binomtest, chi2_contingency

from pipeline.errors import CorruptError
from pipeline.evaluation.metrics import (
    Floats,
    Json,
    Scores,
    binned,
    check_probabilities,
    example_scores,
    frames,
    membership,
    rounded,
    slice_rows,
)
from pipeline.evaluation.predictions import Sets, models_of, read_sets
from pipeline.evaluation.swaps import SWAPS, swap_fields
from pipeline.files import Folders, write_json
from pipeline.params import Params, pick
from pipeline.schema import NO_CONTEXT, PREDICTIONS, Example, read_table
from pipeline.targets.calibration import normalised
from pipeline.task import Task
from pipeline.teachers.scorer import Scorer

Ask = Callable[[Sequence[Example]], npt.NDArray[np.float64]]
"""Examples → the student's label probabilities [N, L]."""
FLIPS_SHOWN = 5
ATTRIBUTED = 8
MOST_WORDS = 60
CONFIDENCE_BINS = 10
SMALLEST_SLICE = 20
SMALLEST_PROBABILITY = 1e-9


@dataclass(frozen=True)
class Answered:
    """An evaluation example with a method's answer on disk."""

    set: str
    example: Example
    probabilities: Floats  # [L]

    @property
    def best(self) -> int:
        """Position of the answer in the labels."""
        return int(self.probabilities.argmax())


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
        ours, theirs = (
            frames(read_table(folders.artifacts / "predictions" / f"{method}.parquet", PREDICTIONS), task.labels)
            for method in (name, reference)
        )
        checked = {}
        for model in models_of(name, params, folders):
            ask, run = _asking(model.scorer(task, params), f"risk {name} {model.run}".rstrip()), model.run or ""
            own = {key: frame.filter(pl.col("run") == run) for key, frame in ours.items()}
            checked[run] = check_run(own, theirs, sets, ask, params)
        first, *others = checked
        document |= {"reference": reference} | ({"run": first} if others else {}) | checked[first]
        document |= {"runs": {run: checked[run] for run in others}} if others else {}
    write_json(document, folders.metrics / "risk" / f"{name}.json")


def _asking(scorer: Scorer, title: str) -> Ask:
    return lambda examples: np.exp(normalised(scorer.label_scores([NO_CONTEXT], examples, title)[0]))


def check_run(ours: Scores, theirs: Scores, sets: Sets, ask: Ask, params: Params) -> Json:
    """`swaps`, `gaps`, `disagreement`, `attributions` of one model. `ours[set]` are its predictions, `theirs[set]` the reference's."""
    labels, domains = params.task.labels, {key: entry.domain for key, entry in params.data.evaluation.items()}
    mine, other = (answered(predictions, sets, labels) for predictions in (ours, theirs))
    scores = [{key: example_scores(frame, key) for key, frame in predictions.items()} for predictions in (ours, theirs)]
    members = {key: membership(examples) for key, examples in sets.items()}
    present = [domain for domain in ("in", "out") if domain in domains.values()]
    words, long = attributions(mine, other, ask, labels)
    return {
        "swaps": rounded(flips(mine, ask, labels, params.evaluation.risk_examples)),
        "gaps": gaps(scores[0], scores[1], labels, members, domains),
        "disagreement": [rounded(disagreement(mine, other, labels, domains, domain)) for domain in present],
        "attributions": rounded(words),
        "attributions_skipped_long": long,
    }


def answered(predictions: Scores, sets: Sets, labels: Sequence[str]) -> list[Answered]:
    """The examples of all sets, in their order, with a method's answers. Raises CorruptError if it does not answer each example once."""
    found = []
    for name, examples in sets.items():
        frame = predictions[name]
        place = {example: row for row, example in enumerate(frame["example_id"])}
        if not len(place) == frame.height == len(examples):
            raise CorruptError(
                f"predictions for set {name!r}: {frame.height} rows for {len(examples)} examples, and the risk checks need one for each. "
                "Run the method's `evaluate` stage again."
            )
        probabilities = check_probabilities(frame, labels, name)
        found += [Answered(name, example, probabilities[place[example.example_id]]) for example in examples]
    return found


def flips(mine: Sequence[Answered], ask: Ask, labels: Sequence[str], per_set: int) -> list[Json]:
    """For each swap how often the answer flips; at most `per_set` texts of each set are asked again for a swap, drawn by their hash.

    `texts`, `with_swap` (texts with something to swap), `asked`, `flips` with `flip_rate` and `ci95`; `mean_shift` and `largest_shift` are
    absolute changes in the probability of the answer given before; `examples`, flips before the largest shifts. Rates and shifts
    are None if nothing was asked.
    """
    holding, chosen = {}, {}
    for swap in SWAPS:
        pairs = [(before, Example(fields)) for before in mine if (fields := swap_fields(swap, before.example.fields)) is not None]
        pairs.sort(key=lambda pair: (pair[1].example_id, pair[0].example.example_id))
        holding[swap.name], chosen[swap.name] = len(pairs), []
        for name in dict.fromkeys(before.set for before in mine):
            chosen[swap.name] += [pair for pair in pairs if pair[0].set == name][:per_set]
    asked = [example for pairs in chosen.values() for _, example in pairs]
    after = iter(ask(asked) if asked else [])
    return [
        {"name": swap.name, "what": swap.what, "texts": len(mine), "with_swap": holding[swap.name]}
        | _flips_of([(before, example, next(after)) for before, example in chosen[swap.name]], labels)
        for swap in SWAPS
    ]


def _flips_of(rows: Sequence[tuple[Answered, Example, Floats]], labels: Sequence[str]) -> Json:
    """What a swap did: rows are the answer before, the swapped text, and the probabilities after."""
    entries = []
    for before, example, after in rows:
        entry = {"set": before.set, "example_id": before.example.example_id, "before": dict(before.example.fields)}
        entry |= {"after": dict(example.fields), "label": before.example.label}
        entry |= {"answer_before": labels[before.best], "answer_after": labels[int(after.argmax())]}
        entries.append(entry | {"p_before": float(before.probabilities[before.best]), "p_after": float(after[before.best])})
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


def gaps(student: Scores, reference: Scores, labels: Sequence[str], members: Scores, domains: Mapping[str, str]) -> list[Json]:
    """One row for each dimension, domain, and set (None: all of the domain) with at least two slices of `SMALLEST_SLICE` examples.

    `student[set]` and `reference[set]` are from `metrics.example_scores`. A row has `p_value` of the student's right answers, and for
    `student` and `reference` the `lowest` and `highest` slice and their `gap`. Between domains, `domain` is None. A domain's only set
    is not listed again.
    """
    present = [domains[name] for name in student]
    groups: list[dict[tuple[str, str | None, str | None], dict[str, Floats]]] = [{}, {}]
    for scores, own in zip((student, reference), groups, strict=True):
        for key, sample in slice_rows(scores, labels, members, domains):
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
    means = {name: float(sample.mean()) for name, sample in slices.items()}
    low, high = (end(means, key=means.__getitem__) for end in (min, max))
    found = {end: {"slice": name, "n": len(slices[name]), "accuracy": means[name]} for end, name in (("lowest", low), ("highest", high))}
    return {**found, "gap": means[high] - means[low]}


def disagreement(
    mine: Sequence[Answered], other: Sequence[Answered], labels: Sequence[str], domains: Mapping[str, str], domain: str
) -> Json:
    """How often student and reference answer differently in a domain: `n`, `share`, and both accuracies by the student's confidence."""
    pairs = [(a, b) for a, b in zip(mine, other, strict=True) if domains[a.set] == domain]
    gold = np.array([labels.index(a.example.label or "") for a, _ in pairs])
    ours, theirs = (np.stack([pair[side].probabilities for pair in pairs]) for side in (0, 1))
    right, right_reference = ours.argmax(axis=1) == gold, theirs.argmax(axis=1) == gold
    differ = ours.argmax(axis=1) != theirs.argmax(axis=1)
    shares = {"disagreement": differ, "student_accuracy": right, "reference_accuracy": right_reference}
    bins = binned(ours.max(axis=1), CONFIDENCE_BINS, shares)
    return {"domain": domain, "n": len(pairs), "share": float(differ.mean()), "by_student_confidence": bins}


def attributions(mine: Sequence[Answered], other: Sequence[Answered], ask: Ask, labels: Sequence[str]) -> tuple[list[Json], int]:
    """Up to `ATTRIBUTED` disagreements, and how many were passed over since they have more than `MOST_WORDS` words.

    An entry has both answers with their probabilities, and `words` with their weights for the student's answer (`attribute`). Sets take
    turns, and within a set the smallest example ids come first: a draw that does not depend on what the models said.
    """
    differ = [pair for pair in zip(mine, other, strict=True) if pair[0].best != pair[1].best]
    short = [pair for pair in differ if sum(len(text.split()) for text in pair[0].example.fields.values()) <= MOST_WORDS]
    short.sort(key=lambda pair: pair[0].example.example_id)
    queues = [[pair for pair in short if pair[0].set == name] for name in dict.fromkeys(one.set for one in mine)]
    chosen = [pair for turn in zip_longest(*queues) for pair in turn if pair is not None][:ATTRIBUTED]
    entries = []
    for (one, two), words in zip(chosen, attribute([(one.example, one.best) for one, _ in chosen], ask), strict=True):
        entry = {"set": one.set, "example_id": one.example.example_id, "fields": dict(one.example.fields), "label": one.example.label}
        entry |= {"student": labels[one.best], "student_p": float(one.probabilities[one.best])}
        entry |= {"reference": labels[two.best], "reference_p": float(two.probabilities[two.best])}
        entries.append({**entry, "words": words})
    return entries, len(differ) - len(short)


def attribute(answers: Sequence[tuple[Example, int]], ask: Ask) -> list[list[Json]]:
    """For each example and answer, the example's words (`field`, `word`, `start` and `end` in characters) with a `weight`.

    The weight is the log-odds (nats) of the answer lost when the word goes: positive if it speaks for the answer, negative if against it.
    """
    parts = [_without_each_word(example) for example, _ in answers]
    asked = [*(example for example, _ in answers), *(without for part in parts for _, without in part)]
    odds = logit(np.clip(ask(asked), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)) if asked else np.empty((0, 0))
    whole, rest = odds[: len(answers)], iter(odds[len(answers) :])
    return [
        [{**word, "weight": float(before[answer] - next(rest)[answer])} for word, _ in part]
        for before, part, (_, answer) in zip(whole, parts, answers, strict=True)
    ]


def _without_each_word(example: Example) -> list[tuple[Json, Example]]:
    found = []
    for name, text in example.fields.items():
        for word in re.finditer(r"\S+", text):
            rest = f"{text[: word.start()].rstrip()} {text[word.end() :].lstrip()}".strip()
            about = {"field": name, "word": word.group(), "start": word.start(), "end": word.end()}
            found.append((about, Example({**example.fields, name: rest})))
    return found
