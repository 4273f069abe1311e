"""`make bench-serve` on a tiny student: a real server, a few requests, and what is written of them."""

import pytest
from serving_world import PROJECT, TEXTS, make_student

from benchmarks.serve import COMPARED, main
from pipeline.errors import UsageError
from pipeline.files import read_json
from pipeline.schema import Example, write_examples

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Measures a student's folder for a moment; returns what is on disk then."""
    write_examples([Example({"text": text}) for text in TEXTS], ("text",), tmp_path / "transfer.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))

    def measured(folder, clients):
        results = tmp_path / "results" / "serve.json"
        main(folder, tmp_path / "transfer.parquet", clients, seconds=0.5, warm_up=0.1, results=results)
        return read_json(results)

    return measured


def test_each_number_of_clients_has_a_row_and_other_students_keep_theirs(run, tmp_path, model_folder, capfd):
    first, second = (make_student(tmp_path / name, model_folder("llama")) for name in ("first", "second"))
    document = run(first, "1,3")
    assert document.keys() >= {*COMPARED, "versions", "seconds"}
    assert document["notes"] == ["server and clients share the cores"]
    assert [(row["student"], row["clients"]) for row in document["rows"]] == [(str(first), 1), (str(first), 3)]
    for row in document["rows"]:
        assert row["requests"] >= row["clients"]
        assert row["requests_per_s"] == pytest.approx(row["requests"] / 0.5, rel=0.5)
        assert 0 < row["server_cpu_ms_per_request"] < 1000
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert 50 < row["peak_rss_mb"] < 5000
    again = run(second, "2")
    assert again["rows"][:2] == document["rows"]
    assert [(row["student"], row["clients"]) for row in again["rows"][2:]] == [(str(second), 2)]
    assert "server and clients share the cores" in capfd.readouterr().out


def test_a_server_that_does_not_start_is_quoted(run, tmp_path, model_folder):
    folder = make_student(tmp_path / "first", model_folder("llama"))
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"did not start; its last words: .*model\.safetensors"):
        run(folder, "1")


def test_a_folder_that_is_no_student_is_refused_by_name(run, tmp_path):
    with pytest.raises(UsageError, match=r"nowhere/manifest\.json and .* are needed; `make run`"):
        run(tmp_path / "nowhere", "1")
