"""llama.cpp through llama-cpp-python on the same prompts, the context's state kept; run by its own environment's Python."""

import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
from llama_cpp import Llama  # type: ignore[import-not-found]


def main() -> None:
    """Print seconds, label log-probabilities and memory."""
    gguf, prompts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
    context, labels = prompts["context_ids"], [ids[0] for ids in prompts["completions"]]
    room = len(context) + max(map(len, prompts["query_ids"])) + 8
    model = Llama(gguf, n_ctx=room, n_threads=os.cpu_count(), n_batch=512, logits_all=False, verbose=False)
    start = time.perf_counter()
    answers = []
    if context:
        model.eval(context)
    for query in prompts["query_ids"]:
        model.n_tokens = len(context)  # eval drops the cached tokens behind this place: the context stays
        model.eval(query)
        logits = np.array(model._ctx.get_logits_ith(-1)[: model.n_vocab()], dtype=np.float64)
        log_z = np.logaddexp.reduce(logits)
        answers.append([float(logits[label] - log_z) for label in labels])
    figures = {
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": _peak_rss_bytes(),
        "answers": answers,
    }
    print(json.dumps(figures))


def _peak_rss_bytes() -> int:
    """As `pipeline.models.process` has it: `ru_maxrss` would begin with the parent's peak."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
