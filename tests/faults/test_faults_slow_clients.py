"""Clients that connect and say nothing, or a letter at a time: they are let go, and others are answered meanwhile."""

import http.client
import json
import socket
import threading
import time
import urllib.request

import pytest
import uvicorn
from faults_world import LARGER, WORKED, count
from serving_world import TEXTS, make_student

from pipeline.serving.deadline import with_deadline
from pipeline.serving.predictor import Predictor
from pipeline.serving.server import Limits, make_app

SECONDS = 1.0


@pytest.fixture
def address(tmp_path, model_folder):
    predictor = Predictor(make_student(tmp_path / "cd", model_folder("llama")), 1)
    config = uvicorn.Config(make_app(predictor, Limits(body_seconds=SECONDS)), port=0, log_level="error", http=with_deadline(SECONDS))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def ask(address):
    url = f"http://{address[0]}:{address[1]}/predict"
    request = urllib.request.Request(url, json.dumps({"inputs": TEXTS[:2]}).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return len(json.load(answer)["predictions"])


def test_clients_that_bring_no_request_are_let_go_while_others_are_answered(address):
    first = [b"", b"P", b"POST /predict HTTP/1.1\r\nHost: x\r\nX: "]
    slow = [socket.create_connection(address, timeout=30) for _ in range(60 * LARGER)]
    try:
        for number, client in enumerate(slow):
            client.sendall(first[number % 3])
        began = time.monotonic()
        while time.monotonic() - began < SECONDS / 2:  # a letter at a time
            for client in slow[2::3]:
                client.sendall(b"x")
            assert ask(address) == 2
        for client in slow:
            try:
                assert client.recv(100) == b""
            except ConnectionResetError:  # closed with letters of ours unread
                continue
        for _ in slow:
            count("clients of `serve` that bring no request", WORKED)
    finally:
        for client in slow:
            client.close()
    assert ask(address) == 2


def test_a_connection_that_is_used_on_and_off_stays(address):
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.connect()
    first = connection.sock
    for _ in range(6):
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read())["status"] == "ok"
        assert connection.sock is first
        time.sleep(SECONDS * 0.3)
    connection.close()
    count("clients of `serve` that bring no request", WORKED)
