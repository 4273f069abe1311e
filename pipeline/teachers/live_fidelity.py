"""How much of the live teacher a finished cache holds: a few of its rows are scored once more, whole, and compared (`cache/fidelity.py`).

The student through which losses are seen is the same model behind no context: what a student starts from. Where the teacher has no context
either, it is one that knows nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.distributions import decode
from pipeline.cache.fidelity import fidelity
from pipeline.cache.folder import read_manifest, read_shard
from pipeline.cache.keys import ExampleIds
from pipeline.cache.reader import CacheReader
from pipeline.teachers.scorer import Query, Scorer
from pipeline.files import context_id
from pipeline.evaluation.metrics import rounded

CONTEXTS = 4
ROWS_A_CONTEXT = 8


def live_fidelity(scorer: Scorer, contexts: Sequence[str], queries: Sequence[Query], folder: Path, work: Path) -> dict[str, Any]:
    """Figures of a cache that `scorer` wrote: of `ROWS_A_CONTEXT` examples in the first contexts, those of `cache.fidelity.fidelity`, and
    bytes a row and a position of the whole cache.
    """
    rising = ExampleIds(query.example_id for query in queries).order.tolist()
    chosen = [queries[place] for place in rising[:: max(1, len(rising) // ROWS_A_CONTEXT)][:ROWS_A_CONTEXT]]
    params = scorer.reading.cache
    with CacheReader(folder, work) as reader:
        keys = [(context_id(text), query.example_id) for text in contexts[:CONTEXTS] for query in chosen]
        rows = reader.take(reader.find(keys))
    answers = rows["completion_ids"].to_pylist()
    live, students = [], []
    for number, text in enumerate(contexts[:CONTEXTS]):
        own = answers[number * len(chosen) : (number + 1) * len(chosen)]
        given = own if scorer.tokens.task.params.completion is not None else None
        live.append(scorer.distributions(text, chosen, given))
        students.append(scorer.distributions("", chosen, given) if any(contexts) else torch.zeros_like(live[-1]))
    figures = fidelity(torch.cat(live), decode(rows, params), torch.cat(students), params.resolution_nats)
    manifest = read_manifest(folder)
    totals = manifest["totals"]
    lists = (read_shard(folder, shard, ["tail_mass"])["tail_mass"] for shard in manifest["shards"])
    positions = sum(len(column.combine_chunks().flatten()) for column in lists)
    sizes = {"bytes_per_row": totals["bytes"] / totals["rows"], "bytes_per_position": totals["bytes"] / positions}
    return rounded({"rows": totals["rows"], "positions": positions, "scored_again": len(rows), **sizes, **_without_count(figures)})


def _without_count(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name != "positions"}
