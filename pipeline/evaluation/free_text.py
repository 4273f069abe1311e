"""Answers in free text, judged: whether they are well formed and right, and whether they say what the reference says.

A form is a JSON object with named keys, some with a list of values. Everything is computed from the answers on disk and the params.
"""

import json

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.evaluation.metrics import RIGHT, Json, example_scores, mean_interval, rounded, spread
from pipeline.params import FormParams


def values_of(answer: str, form: FormParams) -> dict[str, str] | None:
    """What a well-formed answer says, by key; None if it is not a JSON object with exactly the form's keys and allowed values."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or set(found) != set(form.keys):
        return None
    for key, allowed in form.keys.items():
        value = found[key]
        if not isinstance(value, str) or not value.strip() or (allowed and value not in allowed):
            return None
    return found


def shares_of(form: FormParams | None) -> dict[str, pl.Expr]:
    """The shares that a form defines, each with what makes an answer count, over the columns of `parsed`."""
    well_formed = {} if form is None else {"well_formed": pl.col("well_formed")}
    return well_formed if form is None or form.label is None else {**well_formed, "accuracy": RIGHT}


def parsed(table: pa.Table, form: FormParams | None) -> pl.DataFrame:
    """`schema.ANSWERS` rows; with a form also `well_formed`, `predicted` (the value of the label key) and "key.NAME" of each key.

    An ill-formed answer has nulls.
    """
    rows = pl.DataFrame(table)
    if form is None:
        return rows
    found = [values_of(answer, form) or {} for answer in rows["answer"]]
    columns = {f"key.{key}": [values[key].strip() if values else None for values in found] for key in form.keys}
    columns["predicted"] = [values.get(form.label or "") for values in found]
    text = [pl.Series(name, column, pl.String) for name, column in columns.items()]
    return rows.with_columns(pl.Series("well_formed", [bool(values) for values in found], pl.Boolean), *text)


def judge(table: pa.Table, form: FormParams | None, *, resamples: int, seed: int) -> dict[str, Json]:
    """For each evaluation set of `schema.ANSWERS` rows: `n` examples, mean `tokens`, and the shares that the task defines.

    With a form the share of `well_formed` answers, with a label key the `accuracy` (an ill-formed answer is wrong). Each has a `_ci95` that
    resamples examples, since runs (contexts, seeds) share them. If there are several runs, `contexts` has the spread of each share.
    """
    result: dict[str, Json] = {}
    for (name,), part in parsed(table, form).group_by("set", maintain_order=True):
        found: Json = {"n": part["example_id"].n_unique(), "tokens": round(float(np.mean(part["tokens"].to_numpy())), 3)}
        runs = [run for _, run in part.group_by("run", maintain_order=True)]
        for share, counts in shares_of(form).items():
            scores, *each = (example_scores(frame, str(name), counts)["score"].to_numpy() for frame in (part, *runs))
            found |= {share: float(scores.mean()), f"{share}_ci95": mean_interval([scores], resamples=resamples, seed=seed)}
            if len(runs) > 1:
                found.setdefault("contexts", {})[share] = spread([float(own.mean()) for own in each])["contexts"]
        result[str(name)] = rounded(found)
    return result


def agreement(table: pa.Table, reference: pa.Table, form: FormParams | None) -> dict[str, dict[str, float]]:
    """For each set the share of answers that say what the reference's say: `text` word for word, and each key of the form.

    If either answers in several runs, the share is over all pairs. An ill-formed answer agrees on no key.
    """
    keys = ["set", "example_id"]
    both = parsed(table, form).join(parsed(reference, form), on=keys, suffix="_reference", maintain_order="left")
    columns = {"text": "answer"} | ({} if form is None else {key: f"key.{key}" for key in form.keys})
    pairs = {key: (pl.col(column).str.strip_chars(), pl.col(f"{column}_reference").str.strip_chars()) for key, column in columns.items()}
    same = {key: (ours == theirs).fill_null(value=False).mean() for key, (ours, theirs) in pairs.items()}
    return {row.pop("set"): rounded(row) for row in both.group_by("set", maintain_order=True).agg(**same).to_dicts()}
