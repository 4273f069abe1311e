"""lm-evaluation-harness's `hf` model on the same prompts; run by its own environment's Python, so nothing of the project is imported."""

import json
import re
import sys
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance  # type: ignore[import-not-found]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

BATCH = 8


def main() -> None:
    """Print seconds, label log-probabilities and memory."""
    folder, prompts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
    model = HFLM(pretrained=folder, device="cpu", dtype=prompts["dtype"], batch_size=BATCH)
    pairs = [(prompts["context"] + query, label) for query in prompts["queries"] for label in prompts["labels"]]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    model.loglikelihood(requests[:2], disable_tqdm=True)
    start = time.perf_counter()
    answers = model.loglikelihood(requests, disable_tqdm=True)
    seconds = time.perf_counter() - start
    size = len(prompts["labels"])
    figures = {
        "seconds": seconds,
        "peak_rss_bytes": _peak_rss_bytes(),
        "answers": [[value for value, _ in answers[n : n + size]] for n in range(0, len(answers), size)],
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


def _peak_rss_bytes() -> int:
    """As `pipeline.models.process` has it: `ru_maxrss` would begin with the parent's peak."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
