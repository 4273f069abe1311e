"""How weights are learnt: what students and tuned teachers share, and what each has of its own."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.params.base import DEMONSTRATIONS_FILE, Fraction, Frozen


class LoraParams(Frozen):
    """Low-rank adapters (2106.09685): W + alpha / rank · B·A beside frozen weights W."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    modules: Literal["usual", "all_linear"] = "usual"
    """The linear layers that peft's table names for the architecture (for Llama the query and value projections), or all but the head."""


class TuningParams(Frozen):
    """How weights are learnt; shared by students and tuned teachers."""

    steps: PositiveInt
    batch_size: PositiveInt = 8
    """Examples a step."""
    micro_batch: PositiveInt | None = None
    """Examples a forward pass: a step adds up the gradients of several passes. Less memory, the same step but for rounding; null: all."""
    tuning: Literal["full", "lora", "bitfit", "head"] = "full"
    """Which weights are learnt; `pipeline/student/tuning.py` says what each means."""
    freeze_embeddings: bool = False
    """Leave token and position tables (and a head tied to them) as they are. Tunings other than `full` do so anyway."""
    freeze_layers: Annotated[int, Field(ge=0)] = 0
    """So many of the lowest layers, with the embeddings, stay as they are; what they give for a row is computed once."""
    lora: LoraParams | None = None
    """Null: the defaults of `LoraParams`. Read where `tuning: lora`."""
    adapters: Literal["merged", "kept"] = "merged"
    """A LoRA student is saved as a plain model; `kept` leaves its adapter in `adapter/` beside it, for use with peft."""
    learning_rate: PositiveFloat
    warmup: Fraction = 0.1
    """Share of the steps in which the learning rate rises linearly; constant afterwards (2305.16938) unless `decay` is set."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    seed: int = 0

    @model_validator(mode="after")
    def _frozen_layers_have_a_use(self) -> Self:
        if self.freeze_layers and self.tuning == "head":
            raise ValueError("`freeze_layers` beside `tuning: head`, which learns no layer at all; leave it out")
        return self

    @model_validator(mode="after")
    def _adapters_are_lora_s(self) -> Self:
        for key, given in (("lora", self.lora is not None), ("adapters", self.adapters == "kept")):
            if given and self.tuning != "lora":
                raise ValueError(f"`{key}` is for `tuning: lora`, and tuning is {self.tuning!r}; leave it out, or change the tuning")
        return self


class TunedTeacherParams(TuningParams):
    """A teacher's model fine-tuned on the demonstrations' labels (PBFT)."""

    base: str


class AlsoParams(Frozen):
    """What a student also learns from a score cache: its distributions over the vocabulary, its hidden states, or both."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the mean divergence to the cached distributions over the step's positions; 0: they are not learnt."""
    loss: Literal["kl", "reverse_kl", "jensen_shannon"] = "kl"
    temperature: PositiveFloat = 1.0
    """Of both distributions; one that the cache holds normalisers for."""
    hidden_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the distance to the cached hidden states (`student/matching.py`); the cache needs `hidden_layers`."""
    layers: tuple[Annotated[tuple[int, int], Field(strict=False)], ...] = Field(default=((-1, -1),), min_length=1, strict=False)
    """Pairs of a teacher's layer, as its `hidden_layers` names it, and the student's own that is to match it; -1 is the last."""
    batch_size: PositiveInt | None = None
    """Rows of the cache a step; null: the student's batch size."""

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Self:
        if not self.weight and not self.hidden_weight:
            raise ValueError("weight and hidden_weight are both 0, so that nothing is learnt of this cache; leave it out, or set one")
        return self


class StudentParams(TuningParams):
    """A student: where it starts, what it learns from, how."""

    base: str
    """A model folder under artifacts/."""
    layers: str | None = None
    """The base's layers to keep, for example `0-19, 26-29`; null keeps all."""
    learn_from: str
    """`targets/NAME`; `scores/NAME` for a teacher's distributions over the vocabulary, from its cache; or `data/demonstrations.parquet` for
    the demonstrations' labels alone (PBFT)."""
    temperature: PositiveFloat = 1.0
    """Of both distributions, where `learn_from` is `scores/NAME`; one that the cache holds normalisers for."""
    loss: Literal["kl", "reverse_kl", "jensen_shannon", "hard"] = "kl"
    """Between targets and student: KL(target ‖ student), KL(student ‖ target), their Jensen-Shannon divergence, or cross-entropy on the
    target's most probable label."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a cross-entropy beside the loss to the targets: the paper's balance of both."""
    ce_on: Literal["demonstrations", "targets"] = "demonstrations"
    """On the demonstrations' gold labels, or on the targets' most probable label."""
    also: dict[str, AlsoParams] = Field(default={})
    """Teacher → what is learnt of its cache beside `learn_from`: one that the target set lists in `caches`, or that of `scores/NAME`."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1, strict=False)] | None = None
    """Seeds to train with, one after the other, in place of `seed`: one entry, whose results are means over them. The student's folder is
    that of the first, with the others in `seeds/`."""
    held_back: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the transfer set that is not learnt from: the step whose weights agree best with its targets (mean KL) is the one that is
    kept. 0: the last step's weights are kept."""
    evaluate_every: PositiveInt = 10
    """Steps between two looks at what is held back."""
    patience: PositiveInt | None = None
    """Looks without an improvement after which training stops early; null: it runs through all steps."""

    @model_validator(mode="after")
    def _targets_are_needed(self) -> Self:
        if self.learn_from == DEMONSTRATIONS_FILE:
            about = {"loss": self.loss != "kl", "held_back": self.held_back > 0, "also": bool(self.also), "ce_on": self.ce_on == "targets"}
            for key, given in about.items():
                if given:
                    raise ValueError(f"`{key}` is about targets, and learn_from is {self.learn_from}; leave it out, or name a target set")
        if self.temperature != 1.0 and not self.learn_from.startswith("scores/"):
            raise ValueError(f"`temperature` is for distributions from a cache, and learn_from is {self.learn_from}; leave it out")
        if self.ce_on == "targets" and not (self.ce_weight and self.learn_from.startswith("targets/")):
            raise ValueError("`ce_on: targets` needs a `ce_weight` and a target set to learn from")
        matched = [layer for also in self.also.values() if also.hidden_weight for _, layer in also.layers]
        if matched and (self.tuning == "head" or any(0 <= layer < self.freeze_layers for layer in matched)):
            raise ValueError("`also.*.hidden_weight` is about layers that are not learnt here; leave it out, or learn them")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: one stands twice; each has to be another")
        if self.patience is not None and not self.held_back:
            raise ValueError("`patience` needs a part of the transfer set to look at; set `held_back`, for example to 0.1")
        return self

    @property
    def runs(self) -> dict[str, "StudentParams"]:
        """Folder inside the student's → params of one training: "" for the first seed, `seeds/N` for the others."""
        seeds = self.seeds or (self.seed,)
        return {f"seeds/{seed}" if n else "": self.model_copy(update={"seed": seed, "seeds": None}) for n, seed in enumerate(seeds)}
