"""What a training leaves behind: a plain transformers folder with its provenance, metrics, a loss curve.

All of it but the runtime file depends on params and data alone, so that equal runs give equal bytes; seconds and memory go where DVC does
not look.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import replacing, write_json
from pipeline.models.memory import peak_rss_bytes
from pipeline.params import TuningParams
from pipeline.progress import rate
from pipeline.students.loop import Trained
from pipeline.students.optimizer import learning_rate

DIGITS = 6
"""Significant digits of a number in metrics and curves."""


def write_curve(trained: Mapping[int, Trained], params: TuningParams, file: Path) -> None:
    """One line a step, counted from 1: the loss before its update in nats, and the learning rate of the update.

    Where a part is held back, `held_back_kl` is the mean KL to its targets after the update, at the steps that looked. Of several seeds,
    one follows the other, and `seed` says which.
    """
    has_looks, has_seeds = any(run.looks for run in trained.values()), len(trained) > 1
    with replacing(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["step", "loss", "learning_rate", *(["held_back_kl"] if has_looks else []), *(["seed"] if has_seeds else [])])
        for seed, run in trained.items():
            looks = dict(run.looks)
            for step, loss in enumerate(run.losses):
                look = [significant(looks[step + 1]) if step + 1 in looks else ""] if has_looks else []
                own = [seed] if has_seeds else []
                writer.writerow([step + 1, significant(loss), significant(learning_rate(step, params)), *look, *own])


def held_back_summary(trained: Trained, examples: int) -> dict[str, Any]:
    """What the choice of the step came to: nats before training, and after the step whose weights are kept."""
    found = dict(trained.looks)
    return {
        "best_step": trained.best_step,
        "held_back_examples": examples,
        "held_back_kl_nats": significant(found[trained.best_step]),
        "held_back_kl_nats_before": significant(found[0]),
    }


def final_loss(losses: list[float]) -> float:
    """Mean loss of the last tenth of the steps, nats."""
    last = losses[-max(1, len(losses) // 10) :]
    return significant(math.fsum(last) / len(last))


def write_runtime(trained: Sequence[Trained], threads: int, file: Path) -> None:
    """What differs from run to run: time, rate, memory, and where an interrupted run was taken up; of all seeds together."""
    seconds = sum(run.seconds for run in trained)
    values: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(rate(sum(run.tokens_per_second * run.seconds for run in trained), seconds), 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": threads,
        "resumed_at_step": sum(run.resumed_at for run in trained),
    }
    write_json(values, file)


def significant(value: float) -> float:
    """A number rounded to `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")
