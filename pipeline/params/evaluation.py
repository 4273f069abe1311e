"""Baselines, evaluation, and life after training; and the knobs that no result depends on."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from pipeline.params.base import Fraction, Frozen

MONITOR_TESTS = 6
"""Tests that share `monitor.false_alarm_rate`: three of inputs, two of answers, one of accuracy where labels are given."""


class BaselineParams(Frozen):
    """Prompting, without training, on the evaluation sets."""

    prompts: str
    """`targets/NAME`: the prompts of a target set, with its calibration; `scores/NAME`: those of one teacher, where answers are free text;
    `models/NAME`: a model folder with no context, where answers are free text."""
    contexts: Literal["each", "ensemble"]
    """Each context on its own (mean, worst and best are reported), or all averaged as the target set says. Free text cannot be averaged."""

    @property
    def target_set(self) -> str:
        """The target set whose prompts these are; empty where answers are free text."""
        return self.prompts.removeprefix("targets/") if self.prompts.startswith("targets/") else ""


class EvaluationParams(Frozen):
    """What every evaluation shares."""

    reference: str
    """The baseline that counts as the teacher where agreement with the teacher is reported."""
    bootstrap: PositiveInt = 2000
    """Resamples behind each 95 % interval."""
    seed: int = 0
    cost_examples: PositiveInt = 8
    """Examples timed one by one for the cost table."""
    cost_demonstrations: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 4, 8, 16, 32), strict=False)
    """Numbers of demonstrations at which a baseline's models are timed and their memory measured, against the student's none."""
    risk_examples: PositiveInt = 40
    """Examples of each evaluation set that `check` puts to a student again for each kind of swap."""


class RuntimeParams(Frozen):
    """Knobs without meaning for the results; no stage depends on them."""

    threads: PositiveInt | None = None
    """Threads of the matrix products; null takes the cores there are."""
    engine: Literal["local", "ray"] = "local"
    """Where teachers run: in the stage's own process, or on the workers of Ray (docs/scale.md)."""
    workers: PositiveInt | None = None
    """Of Ray; null takes one for each GPU, or one for each machine where there is none."""

    @model_validator(mode="after")
    def _workers_are_ray_s(self) -> Self:
        if self.workers is not None and self.engine != "ray":
            raise ValueError(f"`workers` is for `engine: ray`, and the engine is {self.engine!r}; leave it out, or change the engine")
        return self


class MonitorParams(Frozen):
    """When `shotless monitor` says that retraining is due; no stage depends on it."""

    false_alarm_rate: Annotated[float, Field(gt=0, le=0.2)] = 0.01
    """Chance that inputs like the reference raise any alarm at all, over all tests together."""
    smallest_shift: Fraction = 0.1
    """Smaller shifts of length and confidence (gap of the distribution functions) or label shares (total variation) are no alarm."""
    smallest_vocabulary_share: Fraction = 0.001
    """The same for vocabulary: share of the variance that lies between reference and new inputs; small, since texts share few words."""
    smallest_embedding_share: Fraction = 0.01
    """The same for the last layer's state at the answer position."""
    max_rows: Annotated[int, Field(ge=50)] = 1000
    """Reference and new inputs are each drawn down to so many."""
    permutations: Annotated[int, Field(ge=199)] = 1999
    accuracy_drop: Fraction = 0.05
    """With labels: how far accuracy may lie under the student's own out-of-domain accuracy in `metrics/eval`."""
    min_accuracy: Fraction | None = None
    """With labels: a fixed bound instead."""
    max_memory_mb: PositiveInt | None = None
    """Peak memory of the process that answers; null does not judge it."""
    seed: int = 0

    @model_validator(mode="after")
    def _enough_permutations(self) -> Self:
        needed = math.ceil(MONITOR_TESTS / self.false_alarm_rate) - 1
        if self.permutations < needed:
            raise ValueError(
                f"permutations {self.permutations} cannot reach a false_alarm_rate of {self.false_alarm_rate} over {MONITOR_TESTS} tests; "
                f"set {needed} or more"
            )
        return self
