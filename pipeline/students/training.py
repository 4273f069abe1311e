"""Training a model on what it is to learn, for students and tuned teachers alike: which weights, which forward pass; `loop` has the rest.

Float32, dropout off, AdamW, one packed forward a step, or several where `micro_batch` asks for less memory. What comes out depends on
model, terms and params alone: batches follow from content, and a run that was interrupted goes on from its checkpoint to the same weights.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from pipeline.models.rows import Completions
from pipeline.params import TuningParams
from pipeline.students.answers import AnswerForward, choose_packed
from pipeline.students.batches import Term
from pipeline.students.cached import CacheTerm
from pipeline.students.checkpoint import Checkpoint
from pipeline.students.early_stopping import HeldBack
from pipeline.students.forward import choose_forward, plain_log_probabilities, probe_rows, same_forward
from pipeline.students.frozen import on_stored_states
from pipeline.students.head import on_stored_vectors
from pipeline.students.loop import Plan, Trained, Training
from pipeline.students.matching import attach as attach_matchings
from pipeline.students.matching import detach as detach_matchings
from pipeline.students.processes import Processes
from pipeline.students.tokens_seen import Vocabulary, cut_vocabulary
from pipeline.students.tuning import Tuning, apply_tuning

ALONE = Processes()


def train(
    model: PreTrainedModel,
    completions: Completions,
    terms: Sequence[Term],
    params: TuningParams,
    *,
    title: str,
    cached: Sequence[CacheTerm] = (),
    checkpoint: Checkpoint | None = None,
    held_back: HeldBack | None = None,
    adapter: tuple[Path, str] | None = None,
    processes: Processes = ALONE,
) -> Trained:
    """Train `model` in place; it is a plain model of its architecture before and after, whatever `params.tuning` is.

    `completions` are the token ids of each label's verbaliser, in the labels' order, for `terms` over the labels; `cached` are terms over
    the vocabulary or hidden states, to the first of which `held_back.cached` belongs; `adapter` is the folder where a LoRA adapter is kept
    and the base that it belongs to. Of several `processes` each trains a model of its own, to the same weights. Raises ShotlessError naming
    the step and the examples where a loss or gradient is not finite. The checkpoint, where given, stays until the caller removes it: the
    weights are not on disk yet when this returns.
    """
    model.eval()
    plan = Plan(completions, terms, params, title, cached, checkpoint, held_back, processes, time.monotonic())
    trained, tuning = _train_on_caches(model, plan) if cached else _train_on_labels(model, plan)
    if adapter is not None and processes.first:
        tuning.save_adapter(*adapter)
    tuning.merge()
    return trained


def _train_on_caches(model: PreTrainedModel, plan: Plan) -> tuple[Trained, Tuning]:
    """Training with terms over the vocabulary or hidden states, which need the whole of it."""
    tuning = apply_tuning(model, plan.params)
    matchings = attach_matchings(model, [term.hidden for term in plan.cached], plan.params.seed)
    plain_attention = model.config._attn_implementation or "eager"
    packed, why = choose_packed(model, plan.cached)
    try:
        pairs = zip(plan.cached, matchings, strict=True)
        answers = [AnswerForward(model, term, matching, (packed, why)) for term, matching in pairs]
        labels = same_forward(model, plan.completions, packed, why) if plan.terms else None
        return Training(model, Vocabulary(plan.completions, None), labels, plan, answers).run(tuning), tuning
    finally:
        if packed is not None:
            packed.detach()
            model.set_attn_implementation(plain_attention)
        detach_matchings(model)


def _train_on_labels(model: PreTrainedModel, plan: Plan) -> tuple[Trained, Tuning]:
    """Training whose terms are all over the labels: what they do not need of the vocabulary is left out."""
    rows, params = plan.rows, plan.params
    expected = plain_log_probabilities(model, plan.completions, probe_rows(rows))
    tuning = apply_tuning(model, params)
    small = cut_vocabulary(model, plan.completions, rows, expected)
    probe = [small.ids(row) for row in probe_rows(rows)]
    forward = choose_forward(model, small.completions, probe, expected)
    try:
        if params.tuning == "head":
            taken = [small.ids(example.ids) for example in plan.taken()]
            forward = on_stored_vectors(model, forward, small.completions, probe + taken, expected)
        elif params.freeze_layers:
            taken = [small.ids(example.ids) for example in plan.taken()]
            forward = on_stored_states(forward, small.completions, probe + taken, expected, params.freeze_layers)
        return Training(model, small, forward, plan).run(tuning), tuning
    finally:
        forward.detach()
        small.restore()
