"""The HTTP endpoint: answers, limits, errors, figures, requests that share a pass, and one real process."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
from conftest import PROJECT
from fastapi import HTTPException, Request
from fastapi.testclient import TestClient
from serving_world import TEXTS, make_student

from pipeline.serving.log import PredictionLog
from pipeline.serving.batching import Batcher, OverloadedError
from pipeline.serving.predictor import Prediction, Predictor
from pipeline.serving.server import Limits, _body, make_app


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, model_folder):
    return Predictor(make_student(tmp_path_factory.mktemp("students") / "cd", model_folder("llama")), 1)


@pytest.fixture
def client(predictor, tmp_path):
    limits = Limits(body_bytes=2000, rows=12, chars=100)
    with TestClient(make_app(predictor, limits, PredictionLog(tmp_path / "log.jsonl", "f" * 64))) as client:
        yield client


def test_answers_are_the_predictors_and_bad_rows_have_an_error(client, predictor, tmp_path):
    asked = [TEXTS[0], "", {"text": TEXTS[1]}, 7, "x" * 101, {"body": "x"}]
    done = client.post("/predict", json={"inputs": asked})
    assert done.status_code == 200
    body = done.json()
    assert body["student"] == "cd"
    found = body["predictions"]
    expected = predictor.predict(TEXTS[:2])
    assert found[0]["probabilities"] == pytest.approx(expected[0].probabilities, abs=1e-6)
    assert (found[2]["label"], found[2]["confidence"]) == (expected[1].label, pytest.approx(expected[1].confidence, abs=1e-6))
    assert [row.get("error") for row in found] == [
        None, "text: empty", None, "text: neither a text nor an object", "too long: more than 100 characters", "text: missing",
    ]  # fmt: skip
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [entry["fields"]["text"] for entry in logged] == [TEXTS[0], "", TEXTS[1], 7, "x" * 101, None]
    assert [entry.get("label") for entry in logged] == [row.get("label") for row in found]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("{", 422, "not JSON"),
        ("[" * 900, 422, "not JSON"),
        ("[]", 422, "send an object"),
        ('{"inputs": "a film"}', 422, "send an object"),
        (json.dumps({"inputs": ["a"] * 13}), 422, "13 inputs, and a request may have 12"),
        (json.dumps({"inputs": ["a" * 2000]}), 413, "larger than 2,000 bytes"),
    ],
)
def test_a_request_over_a_limit_is_refused_with_the_reason(client, body, status, said):
    done = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert done.status_code == status
    assert said in done.json()["detail"]


def test_a_body_that_does_not_say_json_is_refused(client):
    assert client.post("/predict", content='{"inputs": []}', headers={"content-type": "text/plain"}).status_code == 415


def test_a_body_of_unknown_length_is_read_no_further_than_the_limit(client):
    sent = []

    def parts():
        for _ in range(100):
            sent.append(1)
            yield b" " * 500

    done = client.post("/predict", content=parts(), headers={"content-type": "application/json"})
    assert done.status_code == 413


def test_half_of_a_surrogate_pair_is_an_error_of_its_row_and_stays_readable_in_the_log(client, tmp_path):
    done = client.post("/predict", content=b'{"inputs": ["a film", "\\ud800"]}', headers={"content-type": "application/json"})
    assert done.status_code == 200
    assert [("error" in row) for row in done.json()["predictions"]] == [False, True]
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [entry["fields"]["text"] for entry in logged] == ["a film", "\ud800"]


def body_that(*events):
    """A request whose body arrives as `events`, each an ASGI message or seconds to wait."""
    left = list(events)

    async def receive():
        while left and not isinstance(left[0], dict):
            await asyncio.sleep(left.pop(0))
        return left.pop(0)

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")], "method": "POST", "path": "/predict"}
    return Request(scope, receive)


PART = {"type": "http.request", "body": b"{", "more_body": True}


@pytest.mark.parametrize(("events", "status"), [([PART, 30.0, PART], 408), ([PART, {"type": "http.disconnect"}], 499)])
def test_a_body_that_does_not_arrive_is_given_up(events, status):
    with pytest.raises(HTTPException) as caught:
        asyncio.run(_body(body_that(*events), 100, 0.01))
    assert caught.value.status_code == status


def test_health_and_metrics_say_what_answered(client, predictor):
    client.post("/predict", json={"inputs": [*TEXTS[:3], ""]})
    client.post("/predict", content="{", headers={"content-type": "application/json"})
    health = client.get("/health").json()
    assert (health["status"], health["student"], health["labels"]) == ("ok", "cd", ["negative", "positive"])
    assert health["weights_sha256"] == predictor.student.weights_sha256
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    figures = answer.text
    assert 'shotless_requests_total{status="200"} 1.0' in figures
    assert 'shotless_requests_total{status="422"} 1.0' in figures
    assert "shotless_row_errors_total 1.0" in figures
    assert sum(float(value) for value in re.findall(r"^shotless_answers_total\{.*\} (.*)$", figures, re.MULTILINE)) == 3
    assert "shotless_confidence_count 3.0" in figures
    assert "process_resident_memory_bytes" in figures


def test_requests_that_arrive_while_the_model_is_busy_share_its_next_pass():
    calls, free = [], threading.Event()

    def answer(rows):
        calls.append(list(rows))
        assert free.wait(10)
        return [Prediction(str(row), 1.0, {}) for row in rows]

    async def main():
        async with Batcher(answer, 4, 6).running() as batcher:
            first = batcher.submit([0])
            while not calls:
                await asyncio.sleep(0.001)
            others = [batcher.submit([n, n]) for n in (1, 2, 3)]
            with pytest.raises(OverloadedError):
                batcher.submit([4])
            free.set()
            return await asyncio.gather(first, *others)

    found = asyncio.run(main())
    assert calls == [[0], [1, 1, 2, 2], [3, 3]]
    assert [[p.label for p in rows] for rows in found] == [["0"], ["1", "1"], ["2", "2"], ["3", "3"]]


def test_a_pass_that_fails_fails_its_requests_and_not_the_next_ones():
    def answer(rows):
        if rows == ["bad"]:
            raise ArithmeticError("no")
        return [Prediction("a", 1.0, {}) for _ in rows]

    async def main():
        async with Batcher(answer, 4, 6).running() as batcher:
            with pytest.raises(ArithmeticError):
                await batcher.submit(["bad"])
            return await batcher.submit(["good"])

    assert [p.label for p in asyncio.run(main())] == ["a"]


def test_whoever_goes_away_does_not_take_the_others_answers():
    async def main():
        async with Batcher(lambda rows: [Prediction(row, 1.0, {}) for row in rows], 4, 6).running() as batcher:
            gone, kept = batcher.submit(["a"]), batcher.submit(["b"])
            gone.cancel()
            return await kept

    assert [p.label for p in asyncio.run(main())] == ["b"]


def test_a_full_queue_tells_a_request_to_come_back(predictor, monkeypatch):
    def full(self, rows):
        raise OverloadedError

    monkeypatch.setattr(Batcher, "submit", full)
    with TestClient(make_app(predictor)) as client:
        done = client.post("/predict", json={"inputs": ["a"]})
    assert (done.status_code, done.headers["retry-after"]) == (503, "1")


def test_a_real_process_listens_on_loopback_answers_and_ends_when_told(tmp_path, model_folder, predictor):
    folder = make_student(tmp_path / "cd", model_folder("llama"))
    command = [
        sys.executable,
        "-c",
        "from pipeline.cli import app; app()",
        "serve",
        "--student",
        str(folder),
        "--port",
        "0",
        "--threads",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = ""
        while "running on" not in said:
            said = server.stderr.readline()
            assert said, "the server ended before it listened"
        address = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        body = json.dumps({"inputs": TEXTS[:2]}).encode()
        request = urllib.request.Request(f"{address}/predict", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = json.load(answer)["predictions"]
        assert [row["label"] for row in found] == [p.label for p in predictor.predict(TEXTS[:2])]
        with pytest.raises(urllib.error.HTTPError, match="415") as refused:
            urllib.request.urlopen(f"{address}/predict", b"{}", timeout=30)
        refused.value.close()
        server.send_signal(signal.SIGTERM)
        server.wait(20)
        assert server.returncode in {0, -signal.SIGTERM}
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
