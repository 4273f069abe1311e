"""Teachers, what their caches keep, and the target sets that are made of them."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from pipeline.errors import choices
from pipeline.params.base import Frozen

Calibration = Literal["none", "contextual", "batch"]


class CacheParams(Frozen):
    """What the score cache keeps of the teacher's distribution at each answer position (`pipeline/cache/encodings.py`)."""

    encoding: Literal["top_k", "top_k_tail", "sampled", "hybrid", "full"] = "hybrid"
    """The `top_k` most probable entries, the rest unknown; the same with the rest as one bucket; `samples` entries drawn from the
    distribution; the entries of probability 1/`samples` or more, `top_k` at most, with the rest drawn from; every entry. `make bench-cache`
    shows what each costs and loses."""
    top_k: Annotated[int, Field(ge=1)] = 32
    samples: Annotated[int, Field(ge=1)] = 96
    """Draws, for `sampled` and `hybrid`. Each stands for a mass of 1/`samples`: a hybrid makes `samples` times the rest's mass of them."""
    resolution_nats: Annotated[float, Field(gt=0, le=1)] | None = 0.0625
    """Log-probabilities are rounded to multiples of it, which compresses, best if it is a power of two; null keeps all of float32."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(), strict=False)
    """Temperatures besides 1 that students may learn at: their normalisers are kept."""
    hidden_layers: tuple[int, ...] = Field(default=(), strict=False)
    """Layers whose output at answer positions is kept in float16; -1 is the last."""


class TeacherParams(Frozen):
    """A model and the contexts it answers in."""

    model: str
    """A model folder under artifacts/: models/NAME, tuned/NAME or students/NAME."""
    contexts: str
    reads: Literal["answers", "texts"] = "answers"
    """What its cache holds distributions of: the answer, or every token of the rendered input, which students may learn `also`."""
    cache: CacheParams = CacheParams()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the forward pass; `auto` takes bfloat16 where there are matrix units for it, else float32."""


class TargetParams(Frozen):
    """How teachers' scores become the distribution that a student learns."""

    teachers: dict[str, PositiveFloat] = Field(min_length=1)
    """Teacher → weight. A teacher's contexts share its weight."""
    calibration: Calibration = "batch"
    calibrations: dict[str, Calibration] = Field(default={})
    """Teachers that are calibrated otherwise than `calibration` says: a zero-shot prompt may lean less than the data of one domain do."""
    calibrate_by: Literal["set", "source"] = "set"
    """Batch calibration over the whole transfer set, or within each of its sources (`data.transfer.beside`): a context shifts the answers
    of one domain otherwise than another's. A baseline on an evaluation set takes the shift of that set's source, where it has one."""
    average: Literal["probability", "log_probability"] = "probability"
    temperature: PositiveFloat = 1.0
    sources: tuple[str, ...] | None = Field(default=None, strict=False, min_length=1)
    """The sources of the transfer set that it is made of; null: all that are drawn from."""
    caches: tuple[str, ...] = Field(default=(), strict=False)
    """Teachers whose whole caches belong to what students of this set may learn (`students.*.also`)."""

    @model_validator(mode="after")
    def _calibrations_have_a_use(self) -> Self:
        kinds = {self.calibrations.get(teacher, self.calibration) for teacher in self.teachers}
        if self.calibrate_by == "source" and "batch" not in kinds:
            raise ValueError(f"`calibrate_by: source` is for `calibration: batch`, and calibration is {self.calibration!r}; leave it out")
        if unknown := set(self.calibrations) - set(self.teachers):
            raise ValueError(f"calibrations: {choices(unknown)} is none of its teachers; choose of: {choices(self.teachers)}")
        return self
