"""Inputs with a student's answers, as the drift tests see them, and the reference as a file.

The reference is made from the transfer set (what the student learnt from) and the student's own answers to it, at the first use, and kept
under the work folder by the hashes of student and inputs: any other student or transfer set gets another file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.files import sha256_json, sha256_text
from pipeline.schema import read_table, write_table

Floats = npt.NDArray[np.float64]
REFERENCE_VERSION = 1
REFERENCE = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),  # all fields, a line each
        pa.field("ids", pa.list_(pa.int32()), nullable=False),  # of the prompt
        pa.field("label", pa.string(), nullable=False),  # the student's answer
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("state", pa.list_(pa.float32()), nullable=False),  # last layer at the answer position
    ]
)


@dataclass(frozen=True)
class Sample:
    """N inputs that could be answered."""

    texts: list[str]
    ids: list[list[int]]
    labels: list[str]
    """The student's answers."""
    confidence: Floats  # [N]
    states: Floats  # [N, H]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Floats:
        """Tokens of each prompt, [N]."""
        return np.array([len(ids) for ids in self.ids], dtype=np.float64)

    def take(self, rows: Sequence[int]) -> "Sample":
        """Some rows, in the order given."""
        index = list(rows)
        return Sample(
            [self.texts[i] for i in index],
            [self.ids[i] for i in index],
            [self.labels[i] for i in index],
            self.confidence[index],
            self.states[index],
        )


def with_shares_of(reference: Sample, samples: Sequence[Sample]) -> Sample:
    """As many rows of `samples` as there can be with the reference's shares of answers: an evaluation set may be drawn so many a label.

    Rows of each label are taken in their order.
    """
    rows = [(sample, row, label) for sample in samples for row, label in enumerate(sample.labels)]
    wanted = {label: reference.labels.count(label) / len(reference) for label in set(reference.labels)}
    held = {label: sum(entry[2] == label for entry in rows) for label in wanted}
    total = min(held[label] / share for label, share in wanted.items())
    left = {label: round(total * share) for label, share in wanted.items()}
    taken: list[list[int]] = [[] for _ in samples]
    for sample, row, label in rows:
        if left.get(label, 0) > 0:
            left[label] -= 1
            taken[next(n for n, other in enumerate(samples) if other is sample)].append(row)
    parts = [sample.take(chosen) for sample, chosen in zip(samples, taken, strict=True)]
    return Sample(
        [text for part in parts for text in part.texts],
        [ids for part in parts for ids in part.ids],
        [label for part in parts for label in part.labels],
        np.concatenate([part.confidence for part in parts]),
        np.concatenate([part.states for part in parts]),
    )


def draw(texts: Sequence[str], count: int, seed: int) -> list[int]:
    """Rows of at most `count` texts, drawn by content: the same texts give the same draw, wherever they stand. In rising order."""
    if len(texts) <= count:
        return list(range(len(texts)))
    ranked = sorted(range(len(texts)), key=lambda row: (sha256_text(f"{seed}\0{texts[row]}"), row))
    return sorted(ranked[:count])


def reference_file(work: Path, student: str, tokenizer: str, inputs: str, max_rows: int, seed: int) -> Path:
    """Where the reference of a student (hash of weights, of tokenizer) on some inputs (hash of their file) lies."""
    key = sha256_json([REFERENCE_VERSION, student, tokenizer, inputs, max_rows, seed])
    return work / "reference" / f"{key[:32]}.parquet"


def write_reference(sample: Sample, file: Path) -> None:
    """Write a reference."""
    columns: dict[str, Any] = {
        "text": sample.texts,
        "ids": sample.ids,
        "label": sample.labels,
        "confidence": sample.confidence,
        "state": list(sample.states.astype(np.float32)),
    }
    write_table(pa.table({f.name: pa.array(columns[f.name], type=f.type) for f in REFERENCE}, schema=REFERENCE), file)


def read_reference(file: Path) -> Sample:
    """Read a reference."""
    table = read_table(file, REFERENCE).to_pydict()
    states = np.array(table["state"], dtype=np.float64)
    return Sample(table["text"], table["ids"], table["label"], np.array(table["confidence"]), states)
