"""Who gets which example: evaluation sets first, then demonstrations, then the transfer set; an example has one role.

Draws go by the rank of sha256(seed, role, example). They do not depend on the order of the file, a larger number extends an earlier draw,
and evaluation sets stay the same if the transfer set grows. What is drawn to be learnt from is compared with the evaluation examples, and
the transfer set with the demonstrations too: a near copy is set aside and the next one drawn. Copies among evaluation sets stay, since no
one learns from them. The transfer set is drawn from all texts of its sources, whatever their labels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.data.examples import Quarantined, SourceExamples, shorten
from pipeline.data.near_copies import Originals
from pipeline.errors import UsageError
from pipeline.files import sha256_text
from pipeline.params import DataParams
from pipeline.schema import Example

LEAST_DRAW = 64
"""Examples compared at once at least."""


@dataclass
class Roles:
    """The examples of each role, in rank order, and the near copies that were kept out."""

    evaluation: dict[str, list[Example]] = field(default_factory=dict)
    demonstrations: list[Example] = field(default_factory=list)
    transfer: list[Example] = field(default_factory=list)
    copies: dict[str, Counter[str]] = field(default_factory=dict)
    """Role → earlier role (`evaluation.NAME` or `demonstrations`) → near copies of its examples that were met and kept out."""
    quarantined: dict[str, Quarantined] = field(default_factory=dict)
    """example_id → what the row is a near copy of."""


def rank(seed: int, role: str, example: Example) -> str:
    """Where an example is in a draw; small ones are drawn first."""
    return sha256_text(f"{seed}\0{role}\0{example.example_id}")


def text_of(example: Example) -> str:
    """All fields as one text, to compare with other examples."""
    return "\n".join(example.fields.values())


def assign(data: DataParams, labels: Sequence[str], sources: Mapping[str, SourceExamples]) -> Roles:
    """Draw every role from its source. `labels` are the task's; none if answers are free text that no label judges.

    Raises UsageError if a role finds too few examples, with role, label, numbers, and what made the source smaller.
    """
    roles = Roles()
    used: dict[str, str] = {}  # example_id → role
    held_out: dict[str, list[Example]] = {}  # role → its examples
    for name, wanted in data.evaluation.items():
        role = f"evaluation.{name}"
        draw = _Draw(role, sources[wanted.source], data, used, {}, roles)
        roles.evaluation[name] = held_out[role] = draw.balanced(labels, wanted.per_label)
        used |= {example.example_id: role for example in held_out[role]}

    wanted = data.demonstrations
    draw = _Draw("demonstrations", sources[wanted.source], data, used, held_out, roles)
    if wanted.max_words is not None:
        short = [example for example in draw.pool if len(text_of(example).split()) <= wanted.max_words]
        draw.lost[f"longer than max_words ({wanted.max_words})"] = len(draw.pool) - len(short)
        draw.pool = short
    draw.seed = data.seed if wanted.seed is None else wanted.seed
    roles.demonstrations = draw.balanced(labels, wanted.per_label)
    used |= {example.example_id: "demonstrations" for example in roles.demonstrations}

    for source, limit in data.transfer.limits.items():
        draw = _Draw("transfer", sources[source], data, used, held_out | {"demonstrations": roles.demonstrations}, roles)
        drawn = draw.first(draw.pool, limit)
        if not drawn:
            raise UsageError(
                f"data.transfer: no example is left in source {source!r}{draw.story()}. Name another source, or add rows to it."
            )
        roles.transfer += drawn
        used |= {example.example_id: "transfer" for example in drawn}
    return roles


class _Draw:
    """A draw of one role from one source: what it may take, and what made that less.

    `groups` are the examples of which it may not take near copies. What it keeps out is added to `roles`.
    """

    def __init__(
        self,
        role: str,
        source: SourceExamples,
        data: DataParams,
        used: Mapping[str, str],
        groups: Mapping[str, Sequence[Example]],
        roles: Roles,
    ) -> None:
        self.role, self.source, self.seed, self.near_copy = role, source, data.seed, data.near_copy
        self.pool = [example for example in source.examples if example.example_id not in used]
        self.lost = Counter({"quarantined": source.bad_rows, "exact repeats": source.counts["exact_repeats_removed"]})
        self.lost.update(f"in {used[example.example_id]}" for example in source.examples if example.example_id in used)
        self._groups, self._roles, self._shown = groups, roles, ""
        self._counts = roles.copies.setdefault(role, Counter(dict.fromkeys(groups, 0)))
        texts = {name: [text_of(example) for example in examples] for name, examples in groups.items()}
        rows = sorted(source.examples, key=lambda example: example.example_id) if groups else []
        self._originals = Originals(texts, [text_of(example) for example in rows], data.near_copy)

    def balanced(self, labels: Sequence[str], per_label: int | None) -> list[Example]:
        """`per_label` examples of each label (None: all there are), together in rank order; of all examples if there are no labels."""
        drawn: list[Example] = []
        for label in labels or [None]:
            found = self.first([e for e in self.pool if label is None or e.label == label], per_label)
            if len(found) < (per_label or 1):
                self.lost["left out by the label rule"] = self.source.counts["left_out_by_label_rule"]
                self.lost["conflicting labels"] = self.source.counts["conflicting_labels_removed"]
                raise UsageError(
                    f"data.{self.role}: {per_label or 1} examples of label {label!r} wanted, {len(found)} found in source "
                    f"{self.source.name!r}{self.story()}. Lower data.{self.role}.per_label, ask less of what comes before, or add labelled "
                    "rows."
                )
            drawn += found
        return self._ranked(drawn)

    def first(self, examples: Sequence[Example], count: int | None) -> list[Example]:
        """The first `count` of `examples` by rank that are not near copies; all of them if None."""
        ranked, drawn = self._ranked(examples), list[Example]()
        while ranked and (count is None or len(drawn) < count):
            size = len(ranked) if count is None else max(count - len(drawn), LEAST_DRAW)
            drawn += self._without_copies(ranked[:size])
            ranked = ranked[size:]
        return drawn[:count]

    def story(self) -> str:
        """What made the source's rows fewer, in words."""
        parts = [f"{count:,} {reason}" for reason, count in self.lost.items() if count]
        rows = f"{self.source.counts['rows']:,} rows"
        return (f" (of its {rows}: {', '.join(parts)})" if parts else f" (all of its {rows} are usable)") + self._shown

    def _ranked(self, examples: Sequence[Example]) -> list[Example]:
        return sorted(examples, key=lambda example: rank(self.seed, self.role, example))

    def _without_copies(self, examples: Sequence[Example]) -> list[Example]:
        kept = []
        for example, copy in zip(examples, self._originals.copies([text_of(example) for example in examples]), strict=True):
            if copy is None:
                kept.append(example)
                continue
            original = self._groups[copy.group][copy.original]
            self._counts[copy.group] += 1
            self.lost[f"near copies of {copy.group}"] += 1
            where = {"role": copy.group, "source": original.source, "line": original.line, "similarity": round(copy.similarity, 4)}
            entry = Quarantined(
                example.source, self.source.file, example.line, "", f"near copy of {copy.group}", shorten(text_of(example)), where
            )
            self._roles.quarantined.setdefault(example.example_id, entry)  # demonstrations and transfer set may meet the same row
            self._shown = self._shown or (
                f". Line {example.line} of {self.source.file} ({entry.value!r}) is {copy.similarity:.0%} like line {original.line} of "
                f"source {original.source!r} ({shorten(text_of(original))!r}). If such texts are different inputs, raise data.near_copy "
                f"({self.near_copy:g})"
            )
        return kept
