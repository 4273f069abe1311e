"""The row store: nothing is scored twice, a killed run ends with the bytes of an unbroken one."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.teachers import scorer as scorer_module
from pipeline.teachers.scorer import Query, Scorer
from pipeline.errors import MismatchError, ShotlessError, UsageError
from pipeline.files import example_id
from pipeline.params import CacheParams, TaskParams
from pipeline.task import Task

CONTEXTS = ["", "Review: a warm film\nSentiment: positive\n\n"]
TASK = Task(TaskParams(template="Review: {text}\nSentiment:", verbalisers={"negative": " negative", "positive": " positive"}))


class Killed(BaseException):
    """Not an Exception: nothing in the project may catch it."""


def queries(count):
    texts = [f"text number {number} " + "good " * (number % 7) for number in range(count)]
    return [Query(example_id({"text": text}), {"text": text}) for text in texts]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(scorer_module, "ROWS_PER_PART", 4)
    monkeypatch.setattr("pipeline.teachers.batches.LARGEST_BUDGET", 64)


@pytest.fixture
def make_scorer(model_folder, tmp_path):
    def make(work="work", **model):
        return Scorer(model_folder("llama", **model), TASK, CacheParams(top_k=4), tmp_path / work)

    return make


def bytes_of(folder: Path):
    return {file.relative_to(folder): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*.parquet"))}


def count_scored(monkeypatch, scorer):
    """Count the rows that reach an engine."""
    scored = []
    original = scorer_module._score_part

    def counting(engine, part, prefixes, ids):
        scored.extend(part.keys)
        return original(engine, part, prefixes, ids)

    monkeypatch.setattr(scorer_module, "_score_part", counting)
    return scored


def test_rows_come_back_in_the_order_asked_for(make_scorer):
    asked = queries(9)
    table = make_scorer().score(CONTEXTS, asked, "test")
    assert table["example_id"].to_pylist() == [query.example_id for query in asked] * 2
    assert len(set(table["context_id"].to_pylist()[:9])) == 1


def test_a_second_request_scores_nothing_and_needs_no_model(make_scorer, monkeypatch):
    first = make_scorer().score(CONTEXTS, queries(9), "test")
    monkeypatch.setattr(scorer_module, "load_model", None)
    assert make_scorer().score(CONTEXTS, queries(9), "test").equals(first)


def test_more_examples_score_only_those(make_scorer, monkeypatch):
    scorer = make_scorer()
    before = scorer.score(CONTEXTS, queries(6), "test")
    scored = count_scored(monkeypatch, scorer)
    after = scorer.score(CONTEXTS, queries(9), "test")
    assert len(scored) == 2 * 3
    kept = [row for row in after.to_pylist() if row["example_id"] in set(before["example_id"].to_pylist())]
    assert pa.Table.from_pylist(kept, schema=before.schema).equals(before)


def test_one_more_context_scores_only_that(make_scorer, monkeypatch):
    scorer = make_scorer()
    scorer.score(CONTEXTS[:1], queries(6), "test")
    scored = count_scored(monkeypatch, scorer)
    scorer.score(CONTEXTS, queries(6), "test")
    assert len(scored) == 6


@pytest.mark.parametrize("killed_at", [0, 1, 3])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(make_scorer, tmp_path, monkeypatch, killed_at):
    unbroken = make_scorer("unbroken").score(CONTEXTS, queries(11), "test")
    original, calls = scorer_module._score_part, []

    def dying(*args):
        if len(calls) == killed_at:
            raise Killed
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(scorer_module, "_score_part", dying)
    with pytest.raises(Killed):
        make_scorer("broken").score(CONTEXTS, queries(11), "test")
    monkeypatch.setattr(scorer_module, "_score_part", original)
    scorer = make_scorer("broken")
    scored = count_scored(monkeypatch, scorer)
    resumed = scorer.score(CONTEXTS, queries(11), "test")
    assert resumed.equals(unbroken)
    assert bytes_of(tmp_path / "broken") == bytes_of(tmp_path / "unbroken")
    assert len(scored) < 22 or killed_at == 0


def test_another_model_does_not_find_the_rows(make_scorer, monkeypatch):
    make_scorer().score(CONTEXTS[:1], queries(3), "test")
    other = make_scorer(num_hidden_layers=2)
    scored = count_scored(monkeypatch, other)
    other.score(CONTEXTS[:1], queries(3), "test")
    assert len(scored) == 3


def test_a_store_of_another_fingerprint_is_refused_with_what_differs(make_scorer):
    scorer = make_scorer()
    other = scorer.fingerprint.model_copy(update={"template": "{text}"})
    with pytest.raises(MismatchError, match=r"template: .* has '\{text\}'"):
        scorer.fingerprint.check(other.model_dump(), Path("somewhere.json"))


def test_a_prompt_longer_than_the_model_is_refused_before_any_work(make_scorer, monkeypatch):
    monkeypatch.setattr(scorer_module, "load_model", None)
    with pytest.raises(UsageError, match="takes 512"):
        make_scorer().score(["long " * 600], queries(2), "test")


def test_a_missing_row_is_an_error_not_a_hole(make_scorer):
    scorer = make_scorer()
    scorer.score(CONTEXTS[:1], queries(3), "test")
    with pytest.raises(ShotlessError, match="1 of 1 rows were not scored"):
        scorer.store.read([("nowhere", "nothing")])


def test_the_seconds_of_rows_are_those_of_the_parts_that_hold_them(make_scorer, monkeypatch):
    """Each part takes a second; a part whose rows are asked for in half counts half."""
    clock = iter(range(1000))
    monkeypatch.setattr(scorer_module.time, "perf_counter", lambda: next(clock))
    scorer, asked = make_scorer(), queries(8)
    scorer.score(CONTEXTS, asked, "test")
    parts = [set(pq.read_table(file)["example_id"].to_pylist()) for file in sorted(scorer.store.folder.glob("part-*.parquet"))]
    assert scorer.seconds(CONTEXTS, asked) == (len(parts), 16)
    seconds, covered = scorer.seconds(CONTEXTS, asked[:3])
    ids = {query.example_id for query in asked[:3]}
    assert covered == 6
    assert seconds == pytest.approx(sum(len(part & ids) / len(part) for part in parts))
    assert make_scorer().seconds(CONTEXTS, asked) == (len(parts), 16), "a later run knows them too"


def test_rows_from_before_times_were_kept_are_not_covered(make_scorer):
    scorer = make_scorer()
    scorer.score(CONTEXTS[:1], queries(4), "test")
    for file in (scorer.store.folder / "times").iterdir():
        file.unlink()
    scorer.score(CONTEXTS[:1], queries(6), "test")
    seconds, covered = scorer.seconds(CONTEXTS[:1], queries(6))
    assert covered == 2
    assert seconds > 0


def test_a_query_that_alone_passes_a_sliding_window_is_known_before_the_work_begins(model_folder, tmp_path):
    folder = model_folder("mistral", sliding_window=48)
    texts = ["short"] * 9 + ["good " * 60]
    asked = [Query(example_id({"text": f"{text} {number}"}), {"text": f"{text} {number}"}) for number, text in enumerate(texts)]
    scorer = Scorer(folder, TASK, CacheParams(top_k=4), tmp_path / "work")
    assert len(scorer.score([""], asked, "test")) == 10
    assert scorer.engine_report["name"] == "generic"
    assert "a sliding window of 48" in scorer.engine_report["why"]
