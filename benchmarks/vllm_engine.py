"""vLLM with prefix caching on the same prompts; run where its wheel is installed."""

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]


def main() -> None:
    """Print seconds and label log-probabilities."""
    folder, prompts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
    labels = [ids[0] for ids in prompts["completions"]]
    whole = [{"prompt_token_ids": prompts["context_ids"] + query} for query in prompts["query_ids"]]
    model = LLM(folder, dtype=prompts["dtype"], enable_prefix_caching=True)
    asked = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=labels, detokenize=False)
    model.generate(whole[:8], asked, use_tqdm=False)
    model.reset_prefix_cache()  # reading the context is part of the time, as for the other engines
    start = time.perf_counter()
    replies = model.generate(whole, asked, use_tqdm=False)
    seconds = time.perf_counter() - start
    answers = [[reply.outputs[0].logprobs[0][label].logprob for label in labels] for reply in replies]
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": None, "answers": answers}))


if __name__ == "__main__":
    main()
