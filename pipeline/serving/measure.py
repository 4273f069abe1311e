"""What a folder answers and what that costs, without torch if the folder does without."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from pipeline.models.process import peak_rss_bytes
from pipeline.serving.predictor import Predictor


def answered(folder: Path, texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A folder's answers as (probabilities or None, token ids), and what they cost: one text at a time, by one thread."""
    predictor = Predictor(folder, 1)
    predictor.predict(texts[:1])  # the first pass prepares
    answers, seconds = [], []
    for text in texts:
        start = perf_counter()
        found = predictor.predict([text])[0]
        seconds.append(perf_counter() - start)
        answers.append((found.probabilities and list(found.probabilities.values()), found.ids))
    return {
        "answers": answers,
        "milliseconds": round(median(seconds) * 1000, 2),
        "disk_mb": round(sum(entry["bytes"] for entry in predictor.student.manifest["files"].values()) / 1e6, 1),
        "peak_mb": round(peak_rss_bytes() / 1e6, 1),
    }
