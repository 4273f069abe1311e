"""Who gets which example: evaluation sets first, then demonstrations, then the transfer set; an example has one role.

Draws go by the rank of sha256(seed, role, example). They do not depend on the order of the file, a larger number extends an earlier draw,
and evaluation sets stay what they are when the transfer set grows. Before anything is drawn to be learnt from, copies of evaluation
examples leave the pool, from every source. The trade-off: copies among evaluation sets themselves are left, since no one learns from them.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.data.examples import Example, SourceExamples
from pipeline.data.leaks import find_copies
from pipeline.data.quarantine import Quarantined
from pipeline.errors import UsageError
from pipeline.files import sha256_text
from pipeline.params import DataParams

Hit = tuple[Example, str, Example, float]


@dataclass
class Roles:
    """The examples of each role, in rank order, and the copies that were kept out."""

    evaluation: dict[str, list[Example]] = field(default_factory=dict)
    demonstrations: list[Example] = field(default_factory=list)
    transfer: list[Example] = field(default_factory=list)
    copies: dict[str, dict[str, int]] = field(default_factory=dict)
    """Role → evaluation set → candidates removed as its copies."""
    copies_of_demonstrations: int = 0
    """Candidates for the transfer set removed as copies of demonstrations."""
    quarantined: list[Quarantined] = field(default_factory=list)


def rank(seed: int, role: str, example: Example) -> str:
    """Where an example stands in a draw; small ones are drawn first."""
    return sha256_text(f"{seed}\0{role}\0{example.example_id}")


def text_of(example: Example) -> str:
    """All fields as one text, for the comparison with other examples."""
    return "\n".join(example.values)


def assign(params: DataParams, labels: Sequence[str], sources: Mapping[str, SourceExamples]) -> Roles:
    """Draw every role from its source.

    Raises UsageError where a role finds too few examples, naming role, label, numbers, and what reduced the pool.
    """
    roles = Roles()
    used: dict[str, str] = {}  # example_id → role
    for name, wanted in params.evaluation.items():
        role = f"evaluation.{name}"
        pool = _Pool(role, sources[wanted.source])
        pool.remove_used(used)
        drawn = _draw_balanced(pool, params.seed, labels, wanted.per_label)
        roles.evaluation[name] = drawn
        used |= {example.example_id: role for example in drawn}

    held_out = [(name, example) for name, drawn in roles.evaluation.items() for example in drawn]
    learnt_from = dict.fromkeys((params.demonstrations.source, *params.transfer.limits))
    leaks: dict[str, str] = {}  # example_id → evaluation set
    for source in (sources[name] for name in learnt_from):
        free = [example for example in source.examples if example.example_id not in used]
        found = _find(free, held_out, params.near_copy)
        leaks |= {candidate.example_id: name for candidate, name, _, _ in found}
        roles.quarantined += [_entry(source.file, "copy of an evaluation example", *hit) for hit in found]

    wanted = params.demonstrations
    pool = _Pool("demonstrations", sources[wanted.source])
    pool.remove_used(used)
    roles.copies["demonstrations"] = pool.remove_leaks(leaks, list(params.evaluation))
    if wanted.max_words is not None:
        limit = wanted.max_words
        pool.keep([e for e in pool.examples if len(text_of(e).split()) <= limit], f"longer than max_words ({limit})")
    seed = params.seed if wanted.seed is None else wanted.seed
    roles.demonstrations = _draw_balanced(pool, seed, labels, wanted.per_label)
    used |= {example.example_id: "demonstrations" for example in roles.demonstrations}

    removed: Counter[str] = Counter(dict.fromkeys(params.evaluation, 0))
    for source, limit in params.transfer.limits.items():
        pool = _Pool("transfer", sources[source])
        pool.remove_used(used)
        removed.update(pool.remove_leaks(leaks, list(params.evaluation)))
        found = _find(pool.examples, [("demonstrations", example) for example in roles.demonstrations], params.near_copy)
        copied = {candidate.example_id for candidate, _, _, _ in found}
        roles.copies_of_demonstrations += len(found)
        roles.quarantined += [_entry(sources[source].file, "copy of a demonstration, kept out of the transfer set", *hit) for hit in found]
        pool.keep([e for e in pool.examples if e.example_id not in copied], "copies of demonstrations")
        drawn = _smallest(pool.examples, limit, params.seed, "transfer")
        if not drawn:
            raise UsageError(
                f"data.transfer: no example is left in source {pool.source!r}{pool.story()}. Name another source, or add rows to it."
            )
        roles.transfer += drawn
        used |= {example.example_id: "transfer" for example in drawn}
    roles.copies["transfer"] = dict(removed)
    return roles


class _Pool:
    """The examples that a role may draw from, and what made them fewer."""

    def __init__(self, role: str, source: SourceExamples) -> None:
        self.role, self.source = role, source.name
        self.examples = list(source.examples)
        self.rows = source.rows
        self.reduced = Counter(
            {
                "quarantined": len(source.bad) + source.conflicting,
                "left out by the label rule": source.left_out,
                "exact repeats": source.repeats,
            }
        )

    def keep(self, examples: list[Example], reason: str) -> None:
        """Go on with `examples`; the others left for `reason`."""
        self.reduced[reason] += len(self.examples) - len(examples)
        self.examples = examples

    def remove_used(self, used: Mapping[str, str]) -> None:
        """Leave out what another role has."""
        self.reduced.update(f"in {used[e.example_id]}" for e in self.examples if e.example_id in used)
        self.examples = [e for e in self.examples if e.example_id not in used]

    def remove_leaks(self, leaks: Mapping[str, str], sets: Sequence[str]) -> dict[str, int]:
        """Leave out copies of evaluation examples; returns how many, by evaluation set."""
        counts = Counter(leaks[e.example_id] for e in self.examples if e.example_id in leaks)
        self.keep([e for e in self.examples if e.example_id not in leaks], "copies of evaluation examples")
        return {name: counts[name] for name in sets}

    def story(self) -> str:
        """What reduced the pool, in words."""
        parts = [f"{count:,} {reason}" for reason, count in self.reduced.items() if count]
        return f" (of its {self.rows:,} rows: {', '.join(parts)})" if parts else f" (all of its {self.rows:,} rows are usable)"


def _smallest(examples: Sequence[Example], count: int | None, seed: int, role: str) -> list[Example]:
    """The first `count` by rank, or all, in rank order."""
    ranked = ((rank(seed, role, example), at) for at, example in enumerate(examples))
    chosen = sorted(ranked) if count is None else heapq.nsmallest(count, ranked)
    return [examples[at] for _, at in chosen]


def _draw_balanced(pool: _Pool, seed: int, labels: Sequence[str], per_label: int | None) -> list[Example]:
    """`per_label` examples of each label (all there are where None), together in rank order; of all where there are no labels."""
    drawn: list[Example] = []
    for label in labels or [None]:
        of_label = [example for example in pool.examples if label is None or example.label == label]
        wanted = 1 if per_label is None else per_label
        if len(of_label) < wanted:
            raise UsageError(
                f"data.{pool.role}: {wanted} examples of label {label!r} wanted, {len(of_label)} found in source {pool.source!r}"
                f"{pool.story()}. Lower data.{pool.role}.per_label, ask less of what comes before, or add labelled rows."
            )
        drawn += _smallest(of_label, per_label, seed, pool.role)
    return _smallest(drawn, None, seed, pool.role)


def _find(candidates: Sequence[Example], originals: Sequence[tuple[str, Example]], threshold: float) -> list[Hit]:
    """Candidates that copy an original: the candidate, the original's set, the original, and how similar they are."""
    copies = find_copies([text_of(e) for e in candidates], [text_of(e) for _, e in originals], threshold)
    return [(candidates[copy.candidate], *originals[copy.original], copy.similarity) for copy in copies]


def _entry(file: str, reason: str, candidate: Example, name: str, original: Example, similarity: float) -> Quarantined:
    copy_of = {"set": name, "source": original.source, "line": original.line, "similarity": round(similarity, 4)}
    return Quarantined(candidate.source, file, candidate.line, "", reason, text_of(candidate), copy_of)
