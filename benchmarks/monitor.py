"""How often `shotless monitor` raises an alarm: on halves of the transfer set, where it should not, and on other domains, where it must.

    python -m benchmarks.monitor --student cd        (after `make run`)

All inputs are answered once; then so many times the transfer set is split at random into two halves, one the reference and the other the
new inputs; so many times half of each evaluation set in domain is held against the transfer set, as the monitor does; and so many times
inputs of each other domain are drawn at random and held against as many of the transfer set. Tests, thresholds and correction are those
of `shotless monitor`, with params.yaml's settings.
"""

from collections import Counter
from typing import Annotated, Any

import numpy as np
import typer

from pipeline.commands.monitor import EVALUATION, TRANSFER, sampled
from pipeline.commands.students import quiet_libraries, student_folder
from pipeline.monitor.drift import drift_tests, outcomes
from pipeline.monitor.sample import Sample, with_shares_of
from pipeline.params import MonitorParams, load_params
from pipeline.serving.predictor import Predictor


def main(
    student: Annotated[str, typer.Option(help="Name of a student, or its folder.")] = "cd",
    times: Annotated[int, typer.Option(min=1, help="Draws of each comparison.")] = 40,
    rows: Annotated[int, typer.Option(min=20, help="Inputs drawn of another domain, and of the transfer set.")] = 200,
) -> None:
    """Count alarms."""
    quiet_libraries()
    params = load_params()
    predictor = Predictor(student_folder(student))
    reference = sampled(predictor, str(TRANSFER), params.monitor)
    rng = np.random.default_rng(0)
    half = len(reference) // 2
    found = Counter[str]()
    for _ in range(times):
        order = rng.permutation(len(reference)).tolist()
        found.update(_alarms(reference.take(order[:half]), reference.take(order[half:]), predictor, params.monitor))
    _say(f"halves of the transfer set ({half:,} against {len(reference) - half:,})", times, found)
    for name, entry in params.data.evaluation.items():
        other = sampled(predictor, str(EVALUATION / f"{name}.parquet"), params.monitor)
        found = Counter[str]()
        for _ in range(times):
            theirs, ours = (rng.permutation(len(sample)).tolist() for sample in (other, reference))
            if entry.domain == "in":  # one half is new, and the other what the monitor knows of texts that were not learnt from
                middle = len(theirs) // 2
                unseen = with_shares_of(reference, [other.take(theirs[middle:])])
                found.update(_alarms(reference, other.take(theirs[:middle]), predictor, params.monitor, unseen))
            else:
                found.update(_alarms(reference.take(ours[:rows]), other.take(theirs[:rows]), predictor, params.monitor))
        if entry.domain == "in":
            _say(f"{len(other) // 2} of {name} (not learnt from) against the transfer set", times, found)
        else:
            _say(f"{min(rows, len(other))} of {name} against {min(rows, len(reference))} of the transfer set", times, found)


def _alarms(reference: Sample, new: Sample, predictor: Any, settings: MonitorParams, unseen: Sample | None = None) -> list[str]:
    """Names of the tests that raise an alarm, with `any` where one does."""
    tests = drift_tests(reference, new, predictor.labels, settings, unseen)
    names = [outcome.test.name for outcome in outcomes(tests, settings.false_alarm_rate) if outcome.alarm]
    return [*names, "any"] if names else []


def _say(what: str, times: int, found: Counter[str]) -> None:
    by_test = ", ".join(f"{name} {count}" for name, count in found.most_common() if name != "any")
    print(f"{what}: an alarm in {found['any']} of {times}{f' ({by_test})' if by_test else ''}", flush=True)


if __name__ == "__main__":
    typer.run(main)
