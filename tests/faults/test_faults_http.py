"""Bad requests to `serve`: each is refused with a reason and a status of its own, none stops the server or reaches another's answer."""

import json
import socket
import threading
import time

import pytest
import uvicorn
from fastapi.testclient import TestClient
from faults_world import LARGER, REFUSED, WORKED, count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_world import TEXTS, make_student

from pipeline.serving.log import PredictionLog
from pipeline.serving.predictor import Predictor
from pipeline.serving.server import Limits, make_app

AREA = "requests to `serve`"
JSON = {"content-type": "application/json"}
LIMITS = Limits(body_bytes=50_000, rows=12, chars=100, body_seconds=0.5)
BODIES = {  # body, status
    "nothing": (b"", 422),
    "no JSON": (b"inputs", 422),
    "cut": (b'{"inputs": ["a', 422),
    "a list": (b"[]", 422),
    "a text": (b'"a"', 422),
    "null": (b"null", 422),
    "NaN": (b"NaN", 422),
    "no inputs": (b"{}", 422),
    "inputs: a text": (b'{"inputs": "a"}', 422),
    "inputs: an object": (b'{"inputs": {"text": "a"}}', 422),
    "inputs: a number": (b'{"inputs": 7}', 422),
    "inputs: null": (b'{"inputs": null}', 422),
    "inputs: none": (b'{"inputs": []}', 200),
    "inputs: all wrong": (b'{"inputs": [1, null, true, [], {}, 1e999, -0.0, NaN, "", {"text": []}]}', 200),
    "inputs: given twice": (b'{"inputs": 7, "inputs": ["a film"]}', 200),
    "too many": (json.dumps({"inputs": ["a"] * 13}).encode(), 422),
    "too large": (b'{"inputs": ["' + b"x" * 60_000 + b'"]}', 413),
    "a long text": (json.dumps({"inputs": ["x" * 101]}).encode(), 200),
    "a long text under another name": (json.dumps({"inputs": [{"body": "x" * 101}]}).encode(), 200),
    "deep": (b"[" * 40_000, 422),
    "deep objects": (b'{"a":' * 9_000, 422),
    "deep within an input": (b'{"inputs": [' + b"[" * 900 + b"]" * 900 + b"]}", 200),
    "deep within a field": (b'{"inputs": [{"text": ' + b"[" * 900 + b"]" * 900 + b"}]}", 200),
    "a long integer": (b'{"inputs": [' + b"9" * 5000 + b"]}", 422),
    "a large number as a text": (b'{"inputs": [1' + b"0" * 4000 + b"]}", 200),
    "not UTF-8": (b'{"inputs": ["\xff\xfe"]}', 422),
    "latin-1": ('{"inputs": ["é"]}'.encode("latin-1"), 422),
    "utf-16": ('{"inputs": ["é"]}'.encode("utf-16"), 200),
    "utf-32": ('{"inputs": ["é"]}'.encode("utf-32"), 200),
    "byte order mark": (b'\xef\xbb\xbf{"inputs": ["a"]}', 200),
    "a lone surrogate": (b'{"inputs": ["\\ud800"]}', 200),
    "NUL": (b'{"inputs": ["a\\u0000b"]}', 200),
    "raw NUL": (b'{"inputs": ["a\0b"]}', 422),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0", 422),
    "XML": (b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a 'a'>]>", 422),
}
POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
RAW = {  # bytes on the wire, and the statuses that may come back; None: the connection may be closed without one
    "no HTTP": (b"hello\r\n\r\n", {400}),
    "an unknown method": (b"STEAL /predict HTTP/1.1\r\nHost: x\r\n\r\n", {405, 400}),
    "a chunk that is none": (CHUNKED + b"zz\r\n", {400, None}),
    "a negative chunk": (CHUNKED + b"-1\r\n", {400, None}),
    "a chunk of exabytes": (CHUNKED + b"fffffffffffffffff\r\n", {400, 408, None}),
    "a negative length": (POST + b"Content-Length: -5\r\n\r\n", {400}),
    "a length that is none": (POST + b"Content-Length: x\r\n\r\n", {400}),
    "two lengths": (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", {400}),
    "a body that does not come": (POST + b"Content-Length: 99\r\n\r\n{", {408}),
    "a header of a megabyte": (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n", {400, 431, None}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n", {400, None}),
}  # fmt: skip
ELSEWHERE = [
    ("GET", "/predict", 405), ("PUT", "/predict", 405), ("DELETE", "/predict", 405), ("PATCH", "/predict", 405),
    ("POST", "/health", 405), ("POST", "/metrics", 405),
    ("GET", "/../etc/passwd", 404), ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404), ("GET", "/health%00", 404),
]  # fmt: skip


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, model_folder):
    return Predictor(make_student(tmp_path_factory.mktemp("students") / "cd", model_folder("llama")), 1)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "log.jsonl"


@pytest.fixture(scope="module")
def client(predictor, log):
    with TestClient(make_app(predictor, LIMITS, PredictionLog(log, "f" * 64))) as client:
        yield client


@pytest.fixture
def still_answers(client, predictor):
    """After every fault the same question has the same answer."""
    yield
    done = client.post("/predict", json={"inputs": TEXTS[:2]})
    assert [row["probabilities"] for row in done.json()["predictions"]] == [
        pytest.approx(found.probabilities, abs=1e-6) for found in predictor.predict(TEXTS[:2])
    ]


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_has_a_status_and_a_reason(client, log, still_answers, name):
    body, status = BODIES[name]
    done = client.post("/predict", content=body, headers=JSON)
    assert done.status_code == status
    assert done.json()["detail" if status != 200 else "predictions"] is not None
    for line in log.read_text("utf-8").splitlines() if log.exists() else []:
        json.loads(line)
    count(AREA, REFUSED if status != 200 else WORKED)


@pytest.mark.parametrize(("method", "path", "status"), ELSEWHERE)
def test_what_is_not_there_is_not_there(client, still_answers, method, path, status):
    assert client.request(method, path).status_code == status
    count(AREA, REFUSED)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", "\t;;"])
def test_another_type_is_refused(client, still_answers, kind):
    assert client.post("/predict", content=b'{"inputs": []}', headers={"content-type": kind}).status_code == 415
    count(AREA, REFUSED)


@pytest.fixture(scope="module")
def address(predictor):
    """A listening server."""
    server = uvicorn.Server(uvicorn.Config(make_app(predictor, LIMITS), port=0, log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def say(address, data):
    """Send bytes; the status that comes back, None where the connection is closed without one."""
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
def test_bytes_that_are_no_request_stop_nothing(address, name):
    data, statuses = RAW[name]
    assert say(address, data) in statuses
    assert say(address, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") == 200
    count(AREA, REFUSED)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6) | st.just("text"), inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=40 * LARGER, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps({"inputs": value}).encode()))
def test_any_body_has_an_answer_or_a_reason(client, body):
    done = client.post("/predict", content=body, headers=JSON)
    assert done.status_code in {200, 413, 422}
    if done.status_code == 200:
        assert len(done.json()["predictions"]) == len(json.loads(body)["inputs"])
    count(AREA, REFUSED if done.status_code != 200 else WORKED)
