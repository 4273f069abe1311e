"""Prompts for the benchmarks: real texts behind contexts of real demonstrations, the same for every engine."""

import json
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from transformers import PreTrainedTokenizerBase

SHARED = Path("../shared/data/sst2/train.jsonl")
PREPARED = Path("artifacts/data/transfer.parquet")
LABELS = (" negative", " positive")
SEPARATOR = "\n\n"


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
    """`count` queries of `query_tokens` ± 8 tokens behind a context of `context_tokens` tokens: demonstrations, the first of them cut."""
    source, _ = texts()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rendered = [f"Review: {text}\nSentiment:" for text in source]
    of_length = [query for query in rendered if abs(len(ids(query)) - query_tokens) <= 8]
    if len(of_length) < count:
        raise SystemExit(f"{len(of_length)} texts of {query_tokens} ± 8 tokens, {count} needed: ask for fewer queries")
    queries = of_length[:count]
    used = set(queries)
    shots = [query + LABELS[number % 2] for number, query in enumerate(query for query in rendered if query not in used)]
    context = _context(tokenizer, shots, context_tokens)
    if context:  # the separator belongs to the query: there no token reaches over the seam, and text and ids say the same
        queries = [SEPARATOR + query for query in queries]
    context_ids = ids(context)
    whole = [ids(context + query) for query in queries[:8]]
    assert whole == [context_ids + ids(query) for query in queries[:8]], "a token reaches over the seam of context and query"
    return Prompts(context, queries, context_ids, [ids(query) for query in queries], [ids(label) for label in LABELS])


def _context(tokenizer: PreTrainedTokenizerBase, shots: list[str], tokens: int) -> str:
    """The last `tokens` tokens of joined demonstrations, cut where the text that is left splits into the same tokens."""
    for count in range(1, len(shots) + 1 if tokens else 1):
        ids = tokenizer(SEPARATOR.join(shots[:count]), add_special_tokens=False)["input_ids"][-tokens:]
        text = str(tokenizer.decode(ids))
        if len(ids) == tokens and tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            return text
    if tokens:
        raise SystemExit(f"the texts make no context of {tokens:,} tokens: ask for a shorter one")
    return ""
