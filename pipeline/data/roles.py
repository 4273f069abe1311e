"""Who gets which example: evaluation sets first, then demonstrations, the transfer set, the pool; an example has one role.

Draws go by the rank of sha256(seed, role, example). They do not depend on the order of the file, a larger number extends an earlier draw,
and evaluation sets stay the same if the transfer set grows. What is drawn to be learnt from is compared with the evaluation examples, and
transfer set and pool with the demonstrations too: a near copy is set aside and the next one drawn. Copies among evaluation sets stay,
since no one learns from them. Transfer set and pool are drawn from all texts of their sources, whatever their labels.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.data.examples import Quarantined, SourceExamples, shorten
from pipeline.data.near_copies import Copy, Originals
from pipeline.errors import UsageError
from pipeline.files import sha256_text
from pipeline.params import DataParams
from pipeline.schema import Example

UNLABELLED = ("transfer", "pool")
"""Roles of texts whose labels are not used."""
LEAST_DRAW = 64
"""Examples compared at once, at least."""


@dataclass
class Roles:
    """The examples of each role, and the near copies that were kept out. Roles: `evaluation.NAME`, `demonstrations`, `transfer`, `pool`."""

    drawn: dict[str, list[Example]] = field(default_factory=dict)
    """Role → its examples in rank order (transfer set and pool: source by source)."""
    copies: dict[str, Counter[str]] = field(default_factory=dict)
    """Role → earlier role → near copies of its examples that were met and kept out."""
    quarantined: dict[str, Quarantined] = field(default_factory=dict)
    """example_id → what the row is a near copy of."""


def text_of(example: Example) -> str:
    """All fields as one text, to compare with other examples."""
    return "\n".join(example.fields.values())


def assign(data: DataParams, labels: Sequence[str], sources: Mapping[str, SourceExamples]) -> Roles:
    """Draw every role from its source. `labels` are the task's; none if answers are free text that no label judges.

    Raises UsageError if a role finds too few examples, with role, label, numbers, and what made the source smaller.
    """
    roles = Roles()
    for name, wanted in data.evaluation.items():
        draw = _Draw(f"evaluation.{name}", sources[wanted.source], data, roles)
        roles.drawn[draw.role] = draw.balanced(labels, wanted.per_label)

    wanted, demonstrations = data.demonstrations, list[Example]()
    for source in (wanted.source, *wanted.extra_sources):
        draw = _Draw("demonstrations", sources[source], data, roles)
        if wanted.max_words is not None:
            short = [example for example in draw.usable if len(text_of(example).split()) <= wanted.max_words]
            draw.lost[f"longer than max_words ({wanted.max_words})"] = len(draw.usable) - len(short)
            draw.usable = short
        draw.seed = data.seed if wanted.seed is None else wanted.seed
        if source == wanted.source:
            drawn = draw.balanced(labels, wanted.per_label, wanted.most_per_label)
        else:
            drawn = draw.first([example for example in draw.usable if not labels or example.label], wanted.extra_sources[source])
        demonstrations = draw.ranked({example.example_id: example for example in [*demonstrations, *drawn]}.values())
    roles.drawn["demonstrations"] = demonstrations

    for role, entry in zip(UNLABELLED, (data.transfer, data.pool), strict=True):
        for source, limit in entry.limits.items() if entry is not None else ():
            draw = _Draw(role, sources[source], data, roles)
            if not (drawn := draw.first(draw.usable, limit)):
                raise UsageError(
                    f"data.{role}: no example is left in source {source!r}{draw.story()}. Name another source, or add rows to it."
                )
            roles.drawn[role] = roles.drawn.get(role, []) + drawn
    return roles


def in_windows(
    roles: Roles, data: DataParams, sources: Mapping[str, SourceExamples], windows: Callable[[Sequence[Example]], list[Example]]
) -> None:
    """Put `windows` of them in the place of the texts of the unlabelled roles, each once, but for near copies, which texts are free of."""
    seen = set[str]()
    for role in (role for role in UNLABELLED if role in roles.drawn):
        drawn, roles.drawn[role] = roles.drawn[role], []
        for source in dict.fromkeys(example.source for example in drawn):
            own = [example for example in drawn if example.source == source]
            pieces, checked = {window.example_id: window for window in windows(own)}, {example.example_id for example in own}
            fresh = [window for key, window in pieces.items() if key not in checked]
            checked |= {window.example_id for window in _Draw(role, sources[source], data, roles).first(fresh, None)}
            roles.drawn[role] += [window for key, window in pieces.items() if key in checked and key not in seen]
            seen |= pieces.keys()


class _Draw:
    """A draw of one role from one source: what it may take, and what made that less. Near copies that it keeps out are added to `roles`."""

    def __init__(self, role: str, source: SourceExamples, data: DataParams, roles: Roles) -> None:
        self.role, self.source, self.seed, self.near_copy = role, source, data.seed, data.near_copy
        used = {example.example_id: other for other, examples in roles.drawn.items() for example in examples}
        self.usable = [example for example in source.examples if example.example_id not in used]
        self.lost = Counter({"quarantined": source.bad_rows, "exact repeats": source.counts["exact_repeats_removed"]})
        self.lost.update(f"in {used[example.example_id]}" for example in source.examples if example.example_id in used)
        earlier = {} if role.startswith("evaluation.") else {name: own for name, own in roles.drawn.items() if name not in UNLABELLED}
        rows = sorted(source.examples, key=lambda example: example.example_id) if earlier else []
        texts = {name: [text_of(example) for example in own] for name, own in earlier.items()}
        self._originals = Originals(texts, [text_of(example) for example in rows], data.near_copy)
        self._roles, self._shown = roles, ""
        roles.copies.setdefault(role, Counter(dict.fromkeys(earlier, 0)))

    def balanced(self, labels: Sequence[str], per_label: int | None, most: int | None = None) -> list[Example]:
        """`per_label` examples of each label, up to `most` of those that have more, together in rank order; of all examples if there are no
        labels.

        None: all there are, which may lack a label as long as there are two.
        """
        counts = self.source.counts
        self.lost.update(
            {"left out by the label rule": counts["left_out_by_label_rule"], "conflicting labels": counts["conflicting_labels_removed"]}
        )
        drawn: list[Example] = []
        few = per_label is None and len({example.label for example in self.usable}.intersection(labels)) < 2
        for label in labels or [None]:
            found = self.first([e for e in self.usable if label is None or e.label == label], most or per_label)
            if len(found) < (per_label or int(few or label is None)):
                raise UsageError(
                    f"data.{self.role}: {per_label or 1} examples of label {label!r} wanted, {len(found)} found in source "
                    f"{self.source.name!r}{self.story()}. Lower data.{self.role}.per_label, ask less of what comes before, or add labelled "
                    "rows."
                )
            drawn += found
        return self.ranked(drawn)

    def first(self, examples: Sequence[Example], count: int | None) -> list[Example]:
        """The first `count` of `examples` by rank that are not near copies; all of them if None."""
        ranked, drawn = self.ranked(examples), list[Example]()
        wanted = len(ranked) if count is None else count
        size = max(wanted, LEAST_DRAW)
        for start in range(0, len(ranked), size):
            block = ranked[start : start + size]
            for example, copy in zip(block, self._originals.copies([text_of(example) for example in block]), strict=True):
                if copy is None:
                    drawn.append(example)
                else:
                    self._keep_out(example, copy)
            if len(drawn) >= wanted:
                break
        return drawn[:wanted]

    def story(self) -> str:
        """What made the source's rows fewer, in words."""
        parts = [f"{count:,} {reason}" for reason, count in self.lost.items() if count]
        rows = f"{self.source.counts['rows']:,} rows"
        return (f" (of its {rows}: {', '.join(parts)})" if parts else f" (all of its {rows} are usable)") + self._shown

    def ranked(self, examples: Iterable[Example]) -> list[Example]:
        """In the order in which they are drawn."""
        return sorted(examples, key=lambda example: sha256_text(f"{self.seed}\0{self.role}\0{example.example_id}"))

    def _keep_out(self, example: Example, copy: Copy) -> None:
        original, like, text = self._roles.drawn[copy.group][copy.original], f"near copy of {copy.group}", shorten(text_of(example))
        self._roles.copies[self.role][copy.group] += 1
        self.lost[f"near copies of {copy.group}"] += 1
        where = {"role": copy.group, "source": original.source, "line": original.line, "similarity": round(copy.similarity, 4)}
        file, line = self.source.place(example.line)
        entry = Quarantined(example.source, file, line, "", like, text, where)
        self._roles.quarantined.setdefault(example.example_id, entry)  # several roles may meet the same row
        self._shown = self._shown or (
            f". Line {line} of {file} ({text!r}) is {copy.similarity:.0%} like line {original.line} of source "
            f"{original.source!r} ({shorten(text_of(original))!r}). If such texts are different inputs, raise data.near_copy "
            f"({self.near_copy:g})"
        )
