"""Rows of a cache, made up, and the fingerprint they go under."""

import pyarrow as pa

from pipeline.cache.fingerprint import Fingerprint
from pipeline.files import sha256_ids
from pipeline.params import CacheParams
from pipeline.schema import SCORES

FINGERPRINT = Fingerprint(
    weights="w",
    tokenizer="t",
    template="{text}",
    verbalisers={"a": " a", "b": " b"},
    completions=[[1], [2]],
    dtype="float32",
    cache=CacheParams(top_k=2).model_dump(mode="json"),
    completion=None,
)


def rows(count):
    return pa.Table.from_pylist(
        [
            {
                "context_id": "c",
                "example_id": f"e{number}",
                "prompt_sha": sha256_ids([number]),
                "prompt_tokens": number,
                "label_logprobs": [-1.0, -2.0],
                "completion_ids": [],
                "completion_logprobs": [],
                "topk_ids": [[151_645, 7]],
                "topk_logprobs": [[-0.5, -1.5]],
                "sampled_ids": [[]],
                "sampled_logprobs": [[]],
                "sampled_counts": [[]],
                "full_logprobs": [[]],
                "log_z": [10.0],
                "tail_mass": [0.1],
                "log_norms": [[0.0]],
                "entropies": [[1.2]],
                "hidden_states": [[]],
            }
            for number in range(count)
        ],
        schema=SCORES,
    )
