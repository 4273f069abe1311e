"""The prepare stage: raw files become examples with roles, contexts, a quarantine and counts, before any model runs.

All that can be wrong with the data is found here, in seconds. Everything derives from the params and the files' content: the same input
gives the same bytes. The trade-off: a source is held in memory once read, about half a gigabyte for a million short texts.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.contexts import build_contexts, measure
from pipeline.data.examples import Example, check_limit, read_source
from pipeline.data.leaks import find_copies
from pipeline.data.local import RECORD
from pipeline.data.quarantine import write_quarantine
from pipeline.data.roles import Roles, assign
from pipeline.errors import CorruptError, ShotlessError, UsageError
from pipeline.files import one_writer, read_json, write_json
from pipeline.files import sha256_file
from pipeline.params import DataParams, Params
from pipeline.schema import SLICE, read_table, write_table
from pipeline.schema import examples as examples_schema
from pipeline.task import Task


def prepare(params: Params, artifacts: Path, metrics: Path) -> None:
    """Write `artifacts/data/` (examples of each role, contexts, quarantine.jsonl) and the counts, to the file `metrics`.

    One run at a time prepares. Raises UsageError for anything in params or files that cannot be used; quarantine.jsonl is written first, to
    look the rows up in.
    """
    with one_writer(artifacts):
        _prepare(params, artifacts, metrics)


def _prepare(params: Params, artifacts: Path, metrics: Path) -> None:
    task, data = Task(params.task), artifacts / "data"
    if data.exists():
        shutil.rmtree(data)
    measures = {folder: measure(task, artifacts / folder) for folder in sorted({c.tokenizer for c in params.contexts.values()})}
    sources = {name: read_source(name, params.data.sources[name], raw_file(artifacts, name), task) for name in _used_sources(params.data)}
    quarantine = data / "quarantine.jsonl"
    set_aside = [entry for source in sources.values() for entry in [*source.bad, *source.conflicts]]
    write_quarantine(set_aside, quarantine)
    for source in sources.values():
        check_limit(source, params.data.bad_rows_limit, quarantine)

    roles = assign(params.data, task.labels, sources)
    write_quarantine([*set_aside, *roles.quarantined], quarantine)
    slices = {name: list(params.data.sources[entry.source].slices) for name, entry in params.data.evaluation.items()}
    _write_roles(roles, task, data, slices)
    leaks = _leaks_left(data, task, params.data)
    queries = [task.query(dict(zip(task.fields, e.values, strict=True))) for e in _queried(roles)]
    context_counts: dict[str, Any] = {}
    for name, entry in params.contexts.items():
        table = build_contexts(name, entry, task, roles.demonstrations, measures[entry.tokenizer], queries, params.data.seed)
        write_table(table, data / "contexts" / f"{name}.parquet")
        context_counts[name] = {"tokens": dict(zip(table["name"].to_pylist(), table["tokens"].to_pylist(), strict=True))}

    counts = {
        "sources": {name: source.counts() for name, source in sources.items()},
        "roles": _role_counts(roles),
        "leaks_left": leaks,
        "contexts": context_counts,
    }
    write_json(counts, metrics)
    _print_counts(counts, params.data)
    if leaks:
        raise ShotlessError(
            f"{data}: {leaks} copies of evaluation examples are left in what is learnt from; this is a bug, please report it."
        )


def raw_file(artifacts: Path, source: str) -> Path:
    """The data file of a source, as fetch recorded it. Raises UsageError where it was not fetched."""
    folder = artifacts / "raw" / source
    record = folder / RECORD
    if not record.is_file():
        raise UsageError(f"{folder}: source {source!r} was not fetched; run `dvc repro fetch`.")
    files = list(read_json(record)["files"])
    if len(files) != 1 or not (folder / files[0]).is_file():
        raise CorruptError(f"{record}: names {files}, and the folder does not hold just that; run `dvc repro --force fetch`.")
    if (found := sha256_file(folder / files[0])) != (written := read_json(record)["files"][files[0]]):
        raise CorruptError(
            f"{folder / files[0]}: has sha256 {found[:12]}…, and was fetched with {str(written)[:12]}…; run `dvc repro --force fetch`."
        )
    return folder / files[0]


def _used_sources(data: DataParams) -> list[str]:
    """Sources that some role draws from, in the order of the params; others are not read."""
    used = {data.demonstrations.source, *data.transfer.limits, *(entry.source for entry in data.evaluation.values())}
    return [name for name in data.sources if name in used]


def _queried(roles: Roles) -> list[Example]:
    return [*roles.transfer, *(example for examples in roles.evaluation.values() for example in examples)]


def _write_roles(roles: Roles, task: Task, data: Path, slices: Mapping[str, Sequence[str]]) -> None:
    write_table(_table(roles.demonstrations, task), data / "demonstrations.parquet")
    write_table(_table(roles.transfer, task, with_labels=False), data / "transfer.parquet")
    for name, examples in roles.evaluation.items():
        write_table(_table(examples, task, slices=slices[name]), data / "evaluation" / f"{name}.parquet")


def _table(examples: Sequence[Example], task: Task, with_labels: bool = True, slices: Sequence[str] = ()) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "example_id": [e.example_id for e in examples],
        "label": [e.label if with_labels else None for e in examples],
        "completion": [e.completion for e in examples],
        "source": [e.source for e in examples],
        "line": [e.line for e in examples],
    }
    columns |= {name: [e.values[i] for e in examples] for i, name in enumerate(task.fields)}
    columns |= {SLICE + name: [e.slices[i] for e in examples] for i, name in enumerate(slices)}
    return pa.table(columns, schema=examples_schema(task.fields, slices))


def _leaks_left(data: Path, task: Task, params: DataParams) -> int:
    """Copies of evaluation examples in the files as written that are learnt from; anything but 0 is a bug."""

    def texts(path: Path) -> list[str]:
        table = read_table(path, examples_schema(task.fields))
        return ["\n".join(values) for values in zip(*(table[name].to_pylist() for name in task.fields), strict=True)]

    learnt = texts(data / "demonstrations.parquet") + texts(data / "transfer.parquet")
    held_out = [text for name in params.evaluation for text in texts(data / "evaluation" / f"{name}.parquet")]
    return sum(1 for _ in find_copies(learnt, held_out, params.near_copy))


def _role_counts(roles: Roles) -> dict[str, Any]:
    """Numbers of each role. The transfer set's labels are not counted: they stay in the raw data."""

    def labelled(examples: Sequence[Example]) -> dict[str, Any]:
        return {"drawn": len(examples), "labels": dict(sorted(Counter(str(e.label) for e in examples).items()))}

    return {
        "demonstrations": labelled(roles.demonstrations) | {"copies_of_evaluation_removed": roles.copies["demonstrations"]},
        "transfer": {
            "drawn": len(roles.transfer),
            "copies_of_evaluation_removed": roles.copies["transfer"],
            "copies_of_demonstrations_removed": roles.copies_of_demonstrations,
        },
        "evaluation": {name: labelled(examples) for name, examples in roles.evaluation.items()},
    }


def _print_counts(counts: Mapping[str, Any], data: DataParams) -> None:
    for name, source in counts["sources"].items():
        print(
            f"{name}: {source['rows']:,} rows, {source['examples']:,} usable; {sum(source['quarantined'].values())} quarantined, "
            f"{source['left_out_by_label_rule']:,} left out by the label rule, {source['exact_repeats_removed']} exact repeats, "
            f"{source['conflicting_labels_removed']} with conflicting labels"
        )
    roles = counts["roles"]
    removed = [f"{sum(roles[role]['copies_of_evaluation_removed'].values())} from {role}" for role in ("demonstrations", "transfer")]
    limits = [f"{source} {limit:,}" for source, limit in data.transfer.limits.items() if limit is not None]
    limit = f" (limits {', '.join(limits)})" if len(data.transfer.limits) > 1 else f" (limit {data.transfer.limit:,})" if limits else ""
    sets = ", ".join(f"{name} {entry['drawn']:,}" for name, entry in roles["evaluation"].items())
    print(
        f"drawn: {roles['demonstrations']['drawn']} demonstrations, {roles['transfer']['drawn']:,} for transfer{limit}; evaluation: {sets}"
    )
    print(f"copies of evaluation examples kept out: {', '.join(removed)}; left: {counts['leaks_left']}")
    for name, entry in counts["contexts"].items():
        print(f"contexts {name}: {', '.join(str(n) for n in entry['tokens'].values())} tokens")
