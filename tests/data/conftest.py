"""Texts of which no two are alike, sources made of them, and archives with given members."""

import io
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.examples import SourceExamples
from pipeline.schema import Example

LABELS = ("negative", "positive")
NOUNS = ["harbour", "violin", "planet", "kitchen", "marble", "lantern", "meadow", "engine", "pepper", "window", "castle", "ribbon"]


@pytest.fixture(scope="session")
def unlike() -> Callable[..., list[str]]:
    """`unlike(count, seed=0)` → texts of which no two are near copies."""

    def make(count: int, seed: int = 0) -> list[str]:
        draw = random.Random(seed)
        return [" ".join([*draw.sample(NOUNS, 3), f"{draw.getrandbits(64):x}", str(i)]) for i in range(count)]

    return make


@pytest.fixture(scope="session")
def source() -> Callable[..., SourceExamples]:
    """`source("a", texts, labels=None)` → these texts as a source; by default the labels take turns."""

    def make(name: str, texts: list[str], labels: list[str | None] | None = None, **counts: Any) -> SourceExamples:
        held = labels or [LABELS[i % 2] for i in range(len(texts))]
        examples = [Example({"text": text}, label, None, name, line) for line, (text, label) in enumerate(zip(texts, held, strict=True), 1)]
        none = {"quarantined": {}, "left_out_by_label_rule": 0, "exact_repeats_removed": 0, "conflicting_labels_removed": 0}
        return SourceExamples(name, f"{name}.csv", examples, [], none | {"rows": len(examples)} | counts)

    return make


@pytest.fixture(scope="session")
def make_tar() -> Callable[..., Path]:
    """`make_tar(path, {name: bytes}, [TarInfo], mode="w:gz")` → a tar archive."""

    def make(path: Path, members: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None, mode: Any = "w:gz") -> Path:
        with tarfile.open(path, mode) as file:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            for info in extra or []:
                file.addfile(info)
        return path

    return make


@pytest.fixture(scope="session")
def make_zip() -> Callable[..., Path]:
    """`make_zip(path, {name: bytes}, mode=0)` → a zip archive; `mode` is the Unix mode of its members."""

    def make(path: Path, members: dict[str, bytes], mode: int = 0) -> Path:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                info = zipfile.ZipInfo(name)
                info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
                file.writestr(info, content)
        return path

    return make
