"""The predictions log: strict JSON, one whole line for each input from any thread, and a full disk that costs lines and nothing else."""

import errno
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.serving.files import PredictionLog, json_line

FULL = Path("/dev/full")  # opens, and every write to it fails with ENOSPC
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=20,
)


def strict(text):
    """JSON as other programs read it: NaN and Infinity are refused."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def without_infinities(value):
    """The same value with None for numbers that JSON lacks, by the definition."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, list):
        return [without_infinities(entry) for entry in value]
    return {key: without_infinities(entry) for key, entry in value.items()} if isinstance(value, dict) else value


@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=4))
@pytest.mark.slow
def test_a_line_is_strict_json_of_the_same_row(row):
    assert strict(json_line(row)) == without_infinities(row)


def test_the_words_nan_and_infinity_stay_in_texts():
    assert strict(json_line({"text": "NaN, -Infinity", "score": float("nan")})) == {"text": "NaN, -Infinity", "score": None}


def test_lines_of_many_threads_are_whole(tmp_path):
    log = PredictionLog(tmp_path / "logs" / "used.jsonl", "f" * 64)
    threads = [
        threading.Thread(target=lambda n=n: [log.append([({"text": f"{n} {'x' * 5000}"}, {"label": "a"})] * 3) for _ in range(20)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in (tmp_path / "logs" / "used.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 240
    assert all(set(row) == {"time", "student", "fields", "label"} and row["student"] == "f" * 16 for row in rows)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_counted_and_named_once(tmp_path, capsys):
    (tmp_path / "log.jsonl").symlink_to(FULL)
    log = PredictionLog(tmp_path / "log.jsonl", "f" * 64)
    for _ in range(3):
        log.append([({"text": "a"}, {"label": "b"})] * 2)
    assert log.lost == 6
    assert capsys.readouterr().err.count("warning:") == 1


def test_a_disk_that_fills_up_within_a_line_tears_that_line_alone(tmp_path, monkeypatch):
    log = PredictionLog(tmp_path / "log.jsonl", "f" * 64)
    real = Path.open

    class Half:
        """A file that takes half of what is written."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            return self.file.write(data[: len(data) // 2])

    monkeypatch.setattr(Path, "open", lambda path, *args, **options: Half(real(path, *args, **options)))
    log.append([({"text": "a"}, {"label": "b"})])
    monkeypatch.undo()
    log.append([({"text": "c"}, {"label": "d"})])
    torn, whole = (tmp_path / "log.jsonl").read_text("utf-8").splitlines()
    assert log.lost == 1
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(torn)
    assert json.loads(whole)["label"] == "d"


def test_a_log_that_cannot_be_opened_is_refused_at_the_start(tmp_path):
    with pytest.raises(OSError, match="directory") as refused:
        PredictionLog(tmp_path, "f" * 64)
    assert refused.value.errno == errno.EISDIR
