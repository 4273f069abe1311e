"""Prompts for the benchmarks: real texts behind contexts of real demonstrations, the same for every engine."""

import json
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from transformers import PreTrainedTokenizerBase

SHARED = Path("../shared/data/sst2/train.jsonl")
PREPARED = Path("artifacts/data/transfer.parquet")
LABELS = (" negative", " positive")


@dataclass(frozen=True)
class Prompts:
    """A context and its queries, as text and as token ids."""

    context: str
    queries: list[str]
    context_ids: list[int]
    query_ids: list[list[int]]
    completions: list[list[int]]
    """Token ids of `LABELS`."""


def texts() -> tuple[list[str], str]:
    """Movie review sentences: SST-2 where it lies beside the project, else the default run's transfer set."""
    if SHARED.is_file():
        return [json.loads(line)["text"] for line in SHARED.read_text("utf-8").splitlines()], "SST-2 train"
    return pl.read_parquet(PREPARED)["text"].to_list(), "the default run's transfer set"


def build(tokenizer: PreTrainedTokenizerBase, context_tokens: int, query_tokens: int, count: int) -> Prompts:
    """`count` queries of `query_tokens` ± 8 tokens behind a context of as near to `context_tokens` as whole demonstrations come."""
    source, _ = texts()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rendered = [f"Review: {text}\nSentiment:" for text in source]
    of_length = [query for query in rendered if abs(len(ids(query)) - query_tokens) <= 8]
    if len(of_length) < count:
        raise SystemExit(f"{len(of_length)} texts of {query_tokens} ± 8 tokens, {count} needed: ask for fewer queries")
    queries = of_length[:count]
    used, context, length = set(queries), "", 0
    for number, query in enumerate(query for query in rendered if query not in used):
        demonstration = f"{query}{LABELS[number % 2]}\n\n"
        size = len(ids(demonstration))
        if length + size // 2 > context_tokens:
            break
        context += demonstration
        length += size
    context_ids = ids(context)
    both = [ids(context + query) for query in queries[:8]]
    assert all(whole[: len(context_ids)] == context_ids for whole in both), "the context's end merges with a query's beginning"
    return Prompts(context, queries, context_ids, [ids(query) for query in queries], [ids(label) for label in LABELS])
