"""Answers in free text, judged: whether they are well formed, right, and what the teacher answers.

A form is a JSON object with named keys, some with a list of values. Everything is computed from the answers on disk and the params alone.
"""

import json
from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa
from scipy.stats import binomtest

from pipeline.params import FormParams

Json = dict[str, Any]


def values_of(answer: str, form: FormParams) -> dict[str, str] | None:
    """What a well-formed answer says, by key; None where it is no JSON object with just the form's keys and allowed values."""
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


def judge(table: pa.Table, form: FormParams | None) -> dict[str, Json]:
    """For each evaluation set of `schema.ANSWERS` rows: n; mean tokens; with a form the share of well-formed answers; with a label key the
    accuracy (an ill-formed answer is wrong). Shares have 95 % Wilson intervals; the contexts of one method are pooled.
    """
    rows = _parsed(table, form)
    result: dict[str, Json] = {}
    for name, part in rows.group_by("set", maintain_order=True):
        found: Json = {"n": part.height, "tokens": round(float(part["tokens"].cast(pl.Float64).mean() or 0.0), 3)}  # type: ignore[arg-type]
        if form is not None:
            found |= _share("well_formed", part["well_formed"])
        if form is not None and form.label is not None:
            found |= _share("accuracy", (part["predicted"] == part["label"]).fill_null(value=False))
        result[str(name[0])] = found
    return result


def agreement(table: pa.Table, reference: pa.Table, form: FormParams | None) -> dict[str, Json]:
    """For each set the share of answers that say what the reference's say: `text` word for word, and each key of the form's.

    Where the reference answers in several contexts, the share is over its answers. An ill-formed answer agrees on no key.
    """
    keys = ["set", "example_id"]
    ours, theirs = _parsed(table, form), _parsed(reference, form)
    both = ours.join(theirs, on=keys, how="inner", suffix="_reference", maintain_order="left")
    shares: dict[str, Json] = {}
    for name, part in both.group_by("set", maintain_order=True):
        found = {"text": round(float((part["answer"].str.strip_chars() == part["answer_reference"].str.strip_chars()).mean() or 0.0), 6)}  # type: ignore[arg-type]
        for key in form.keys if form is not None else ():
            same = part[f"key.{key}"] == part[f"key.{key}_reference"]
            found[key] = round(float(same.fill_null(value=False).mean() or 0.0), 6)  # type: ignore[arg-type]
        shares[str(name[0])] = found
    return shares


def summary(sets: Mapping[str, Json], domains: Mapping[str, str]) -> dict[str, float]:
    """One flat row of means over sets, for `dvc metrics`."""
    row: dict[str, float] = {}
    for what in ("well_formed", "accuracy"):
        for domain in ("in", "out"):
            values = [found[what] for name, found in sets.items() if domains[name] == domain and what in found]
            if values:
                row[f"{what}_{domain}"] = round(sum(values) / len(values), 6)
    return row


def _parsed(table: pa.Table, form: FormParams | None) -> pl.DataFrame:
    rows = pl.DataFrame(pl.from_arrow(table))
    if form is None:
        return rows
    found = [values_of(answer, form) for answer in rows["answer"]]
    columns = [
        pl.Series(f"key.{key}", [None if values is None else values[key].strip() for values in found], pl.String) for key in form.keys
    ]
    label = None if form.label is None else form.label
    predicted = [None if values is None or label is None else values[label] for values in found]
    return rows.with_columns(
        pl.Series("well_formed", [values is not None for values in found]), pl.Series("predicted", predicted, pl.String), *columns
    )


def _share(name: str, right: pl.Series) -> Json:
    count, total = int(right.sum()), len(right)
    interval = binomtest(count, total).proportion_ci(0.95, "wilson")
    return {name: round(count / total, 6), f"{name}_ci95": [round(float(interval.low), 6), round(float(interval.high), 6)]}
