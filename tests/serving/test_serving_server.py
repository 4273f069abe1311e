"""The HTTP endpoint: answers, limits, errors, figures, requests that share a pass, and one real process."""

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from fastapi import HTTPException, Request
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_world import PROJECT, TEXTS, make_student

from pipeline.serving.files import PredictionLog
from pipeline.serving.predictor import Prediction, Predictor
from pipeline.serving.server import Batcher, Limits, make_app, read_inputs

JSON = {"content-type": "application/json"}
LIMITS = Limits(body_bytes=50_000, rows=12, body_seconds=0.5, batch_rows=64, waiting_rows=1024)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, model_folder):
    return Predictor(make_student(tmp_path_factory.mktemp("students") / "cd", model_folder("llama")), 1, max_chars=100)


@pytest.fixture
def client(predictor, tmp_path):
    with TestClient(make_app(predictor, LIMITS, PredictionLog(tmp_path / "log.jsonl", "f" * 64))) as client:
        yield client


@pytest.fixture(scope="module")
def address(predictor):
    """Host and port of a listening server."""
    config = uvicorn.Config(make_app(predictor, LIMITS), port=0, log_level="critical", access_log=False, http="h11")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def ask(address, inputs):
    url = f"http://{address[0]}:{address[1]}/predict"
    request = urllib.request.Request(url, json.dumps({"inputs": inputs}).encode(), JSON)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["predictions"]


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
        None, "text: empty", None, "text: neither a text nor an object", "text: longer than 100 characters", "text: missing",
    ]  # fmt: skip
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [entry["fields"]["text"] for entry in logged] == [TEXTS[0], "", TEXTS[1], 7, "x" * 101, None]
    assert [entry.get("label") for entry in logged] == [row.get("label") for row in found]


BODIES = {  # body, status, words of the reason
    "empty": (b"", 422, "not JSON"),
    "not JSON": (b"inputs", 422, "not JSON"),
    "cut": (b'{"inputs": ["a', 422, "not JSON"),
    "a list": (b"[]", 422, "send an object"),
    "NaN": (b"NaN", 422, "send an object"),
    "no inputs": (b"{}", 422, "send an object"),
    "inputs: a text": (b'{"inputs": "a"}', 422, "send an object"),
    "inputs: an object": (b'{"inputs": {"text": "a"}}', 422, "send an object"),
    "too many": (json.dumps({"inputs": ["a"] * 13}).encode(), 422, "13 inputs, and a request may have 12"),
    "too large": (b'{"inputs": ["' + b"x" * 60_000 + b'"]}', 413, "larger than 50,000 bytes"),
    "deep": (b"[" * 40_000, 422, "not JSON"),
    "a long integer": (b'{"inputs": [' + b"9" * 5000 + b"]}", 422, "not JSON"),
    "not UTF-8": (b'{"inputs": ["\xff\xfe"]}', 422, "not JSON"),
    "raw NUL": (b'{"inputs": ["a\0b"]}', 422, "not JSON"),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0", 422, "not JSON"),
}
ROWS = {  # a body that is answered, and each row's error, None for an answer
    "nothing": (b'{"inputs": []}', []),
    "wrong kinds": (b'{"inputs": [1, null, true, [], 1e999, NaN]}', ["text: neither a text nor an object"] * 6),
    "wrong fields": (b'{"inputs": [{}, {"text": []}, {"text": NaN}]}', ["text: missing", "text: not a text", "text: not a text"]),
    "given twice": (b'{"inputs": 7, "inputs": ["a film"]}', [None]),
    "deep within a field": (b'{"inputs": [{"text": ' + b"[" * 900 + b"]" * 900 + b"}]}", ["text: not a text"]),
    "a long text": (json.dumps({"inputs": [{"text": "x" * 101}, "x" * 101]}).encode(), ["text: longer than 100 characters"] * 2),
    "utf-16": ('{"inputs": ["é"]}'.encode("utf-16"), [None]),
    "byte order mark": (b'\xef\xbb\xbf{"inputs": ["a"]}', [None]),
    "half of a surrogate pair": (b'{"inputs": ["a film", "\\ud800"]}', [None, "text: lone surrogate"]),
    "NUL": (b'{"inputs": ["a\\u0000b"]}', ["text: control character"]),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_has_a_status_and_a_reason(client, name):
    body, status, reason = BODIES[name]
    done = client.post("/predict", content=body, headers=JSON)
    assert done.status_code == status
    assert reason in done.json()["detail"]


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_has_an_error_and_a_line_of_strict_json_in_the_log(client, tmp_path, name):
    body, errors = ROWS[name]
    done = client.post("/predict", content=body, headers=JSON)
    assert done.status_code == 200
    assert [row.get("error") for row in done.json()["predictions"]] == errors
    logged = (tmp_path / "log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line, parse_constant=pytest.fail).get("error") for line in logged] == errors


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", "\t;;"])
def test_another_type_is_refused(client, kind):
    assert client.post("/predict", content=b'{"inputs": []}', headers={"content-type": kind}).status_code == 415


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6) | st.just("text"), inner, max_size=3),
    max_leaves=20,
)


def is_text(value):
    """Whether a row has an answer, by the rule of training: printable text of at most 100 characters once stripped."""
    value = value.get("text") if isinstance(value, dict) else value
    if not isinstance(value, str) or re.search("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]", value.strip()):
        return False
    return any(unicodedata.category(character) not in {"Cc", "Cf", "Zl", "Zp", "Zs"} for character in value)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps({"inputs": value}).encode()))
@pytest.mark.slow
def test_any_body_has_an_answer_for_each_row_that_is_a_text_or_a_reason(client, body):
    done = client.post("/predict", content=body, headers=JSON)
    try:
        inputs = json.loads(body)["inputs"]
        assert isinstance(inputs, list)
    except (ValueError, TypeError, KeyError, AssertionError):
        assert done.status_code == 422
        return
    assert done.status_code == 200
    assert [row.get("error") is None for row in done.json()["predictions"]] == [is_text(value) for value in inputs]


def test_a_body_of_unknown_length_is_read_no_further_than_the_limit(client):
    def parts():
        for _ in range(300):
            yield b" " * 500

    assert client.post("/predict", content=parts(), headers=JSON).status_code == 413


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
        asyncio.run(read_inputs(body_that(*events), replace(LIMITS, body_seconds=0.01)))
    assert caught.value.status_code == status


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_under_the_log_costs_no_answer_and_is_counted(predictor, tmp_path, capsys):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with TestClient(make_app(predictor, LIMITS, PredictionLog(tmp_path / "log.jsonl", "f" * 64))) as client:
        for _ in range(3):
            done = client.post("/predict", json={"inputs": TEXTS[:2]})
            assert (done.status_code, len(done.json()["predictions"])) == (200, 2)
        assert "shotless_log_lines_lost 6.0" in client.get("/metrics").text
    assert capsys.readouterr().err.count("warning:") == 1


def test_a_slow_disk_under_the_log_keeps_no_one_waiting(predictor, tmp_path, monkeypatch):
    log, free = PredictionLog(tmp_path / "log.jsonl", "f" * 64), threading.Event()
    monkeypatch.setattr(log, "append", lambda _rows: free.wait(20))
    app, messages = make_app(predictor, LIMITS, log), []

    async def main():
        body = json.dumps({"inputs": TEXTS[:1]}).encode()

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            messages.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        request = asyncio.create_task(app(scope, receive, send))
        while not any(message["type"] == "http.response.body" for message in messages):
            await asyncio.sleep(0.01)
        assert not request.done()  # the answer was sent, and the log still waits
        free.set()
        await request

    asyncio.run(asyncio.wait_for(main(), 15))


def test_health_and_metrics_say_what_answered(client, predictor):
    client.post("/predict", json={"inputs": [*TEXTS[:3], ""]})
    client.post("/predict", content="{", headers=JSON)
    health = client.get("/health").json()
    assert (health["status"], health["student"], health["labels"]) == ("ok", "cd", ["negative", "positive"])
    assert (health["fields"], health["engine"], health["waiting_rows"]) == (["text"], predictor.engine.name, 0)
    assert health["weights_sha256"] == predictor.weights_sha256
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    figures = answer.text
    assert 'shotless_requests_total{status="200"} 1.0' in figures
    assert 'shotless_requests_total{status="422"} 1.0' in figures
    assert "shotless_row_errors_total 1.0" in figures
    assert sum(float(value) for value in re.findall(r"^shotless_answers_total\{.*\} (.*)$", figures, re.MULTILINE)) == 3
    assert "shotless_confidence_count 3.0" in figures
    assert "process_resident_memory_bytes" in figures


def batcher(answer, **limits):
    return Batcher(answer, replace(LIMITS, **{"batch_rows": 4, "waiting_rows": 6, **limits}))


def test_requests_that_arrive_while_the_model_is_busy_share_its_next_pass():
    calls, free = [], threading.Event()

    def answer(rows):
        calls.append(list(rows))
        assert free.wait(10)
        return [Prediction(str(row), 1.0, {}) for row in rows]

    async def main():
        asked = batcher(answer)
        first = asyncio.create_task(asked.ask([0]))
        while not calls:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(asked.ask([n, n])) for n in (1, 2, 3)]
        await asyncio.sleep(0.01)
        assert asked.waiting == 6
        with pytest.raises(HTTPException, match="503"):
            await asked.ask([4])
        free.set()
        return await asyncio.gather(first, *others)

    found = asyncio.run(main())
    assert calls == [[0], [1, 1, 2, 2], [3, 3]]
    assert [[p.label for p in rows] for rows in found] == [["0"], ["1", "1"], ["2", "2"], ["3", "3"]]


def test_a_request_of_more_rows_than_a_pass_has_gets_one_alone():
    calls = []

    def answer(rows):
        calls.append(len(rows))
        return [Prediction(str(row), 1.0, {}) for row in rows]

    async def main():
        asked = batcher(answer, waiting_rows=20)
        return await asyncio.gather(*(asked.ask(list(range(count))) for count in (9, 0, 2)))

    assert [[p.label for p in rows] for rows in asyncio.run(main())] == [[str(n) for n in range(count)] for count in (9, 0, 2)]
    assert calls == [9, 2]


def test_a_pass_that_fails_fails_its_requests_and_not_the_next_ones():
    def answer(rows):
        if rows == ["bad"]:
            raise ArithmeticError("no")
        return [Prediction("a", 1.0, {}) for _ in rows]

    async def main():
        asked = batcher(answer)
        with pytest.raises(ArithmeticError):
            await asked.ask(["bad"])
        return await asked.ask(["good"])

    assert [p.label for p in asyncio.run(main())] == ["a"]


def test_whoever_goes_away_does_not_take_the_others_answers():
    calls, free = [], threading.Event()

    def answer(rows):
        calls.append(list(rows))
        assert free.wait(10)
        return [Prediction(row, 1.0, {}) for row in rows]

    async def main():
        asked = batcher(answer)
        running = asyncio.create_task(asked.ask(["running"]))
        while not calls:
            await asyncio.sleep(0.001)
        waiting, kept = (asyncio.create_task(asked.ask([name])) for name in ("waiting", "kept"))
        await asyncio.sleep(0.01)
        running.cancel()
        waiting.cancel()
        await asyncio.sleep(0.01)
        free.set()
        return await kept

    assert [p.label for p in asyncio.run(main())] == ["kept"]
    assert calls == [["running"], ["kept"]]  # what nobody waits for is not asked


def test_a_full_queue_tells_a_request_to_come_back(predictor, monkeypatch):
    began, free = threading.Event(), threading.Event()

    def slowly(rows):
        began.set()
        assert free.wait(20)
        return [Prediction(predictor.labels[0], 1.0, {}) for _ in rows]

    monkeypatch.setattr(predictor, "predict", slowly)
    with TestClient(make_app(predictor, replace(LIMITS, waiting_rows=3))) as client, ThreadPoolExecutor(2) as others:
        first = others.submit(client.post, "/predict", json={"inputs": ["a"]})
        assert began.wait(20)
        second = others.submit(client.post, "/predict", json={"inputs": ["b", "c"]})
        while client.get("/health").json()["waiting_rows"] < 2:
            time.sleep(0.01)
        done = client.post("/predict", json={"inputs": ["d", "e"]})
        free.set()
        assert (done.status_code, done.headers["retry-after"]) == (503, "1")
        assert (first.result().status_code, second.result().status_code) == (200, 200)


@pytest.mark.slow
def test_many_clients_at_once_each_get_their_own_answers(address, predictor):
    expected = dict(zip(TEXTS, predictor.predict(TEXTS), strict=True))

    def asks(number):
        dice = random.Random(number)
        for _ in range(15):
            texts = dice.choices([*TEXTS, ""], k=dice.randrange(1, 12))
            for text, row in zip(texts, ask(address, texts), strict=True):
                if text:
                    assert row["probabilities"] == pytest.approx(expected[text].probabilities, abs=1e-5)
                else:
                    assert row == {"error": "text: empty"}

    with ThreadPoolExecutor(6) as clients:
        list(clients.map(asks, range(6)))


def test_clients_that_bring_no_request_keep_no_one_from_an_answer(address):
    beginnings = [b"", b"P", b"POST /predict HTTP/1.1\r\nHost: x\r\nX: "]
    slow = [socket.create_connection(address, timeout=30) for _ in range(100)]
    try:
        for number, client in enumerate(slow):
            client.sendall(beginnings[number % 3])
        assert len(ask(address, TEXTS[:2])) == 2
    finally:
        for client in slow:
            client.close()


POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
RAW = {  # bytes on the wire, and the statuses that may come back; None: the connection may be closed without one
    "not HTTP": (b"hello\r\n\r\n", {400}),
    "a chunk without a length": (CHUNKED + b"zz\r\n", {400, None}),
    "a chunk of exabytes": (CHUNKED + b"fffffffffffffffff\r\n", {400, 408, None}),
    "a negative length": (POST + b"Content-Length: -5\r\n\r\n", {400}),
    "a body that does not come": (POST + b"Content-Length: 99\r\n\r\n{", {408}),
    "a header of a megabyte": (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n", {400, 431, None}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n", {400, None}),
}  # fmt: skip


def say(address, data):
    """Send bytes; the status that comes back, None if the connection is closed without one."""
    with socket.create_connection(address, timeout=20) as connection:
        answer = b""
        try:
            connection.sendall(data)
            while b"\r\n" not in answer and (part := connection.recv(4096)):
                answer += part
        except (ConnectionResetError, BrokenPipeError):
            pass
    return int(answer.split()[1]) if answer else None


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_not_a_request_stop_nothing(address, name):
    data, statuses = RAW[name]
    assert say(address, data) in statuses
    assert say(address, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") == 200


@pytest.mark.slow
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
    server = subprocess.Popen(command, cwd=tmp_path, env={"PYTHONPATH": str(PROJECT)}, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = ""
        while "running on" not in said:
            said = server.stderr.readline()
            assert said, "the server ended before it listened"
        port = re.search(r"http://127\.0\.0\.1:(\d+)", said)[1]
        assert [row["label"] for row in ask(("127.0.0.1", port), TEXTS[:2])] == [p.label for p in predictor.predict(TEXTS[:2])]
        with pytest.raises(urllib.error.HTTPError, match="415") as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/predict", b"{}", timeout=30)
        refused.value.close()
        server.send_signal(signal.SIGTERM)
        server.wait(20)
        assert server.returncode in {0, -signal.SIGTERM}
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
