"""`predict` over many rows and `serve` under many clients for long: memory stays where it was, nothing is lost, all comes in order."""

import json
import os
import random
import re
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults_world import LARGER, WORKED, count
from serving_world import TEXTS
from stage_world import copy

from pipeline.serving.predictor import Predictor

ALLOWED_BYTES = 48 << 20


def write_rows(file, count):
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            text = "" if number % 50 == 49 else f"{TEXTS[number % len(TEXTS)]} {number % 977}"
            lines.write(json.dumps({"id": number, "text": text}) + "\n")


def test_predict_over_ten_times_the_rows_takes_the_same_memory_and_keeps_their_order(stages, trained, tmp_path):
    folder, peaks = copy(trained, tmp_path / "project"), []
    command = ["shotless", "predict", "--student", "cd", "-i", "rows.jsonl", "-o", "out.jsonl", "--keep", "id", "--window", "64"]
    for rows in (100 * LARGER, 1_000 * LARGER):
        write_rows(folder / "rows.jsonl", rows)
        peaks.append(stages.good(folder, *command, seconds=3600, large_pieces=True).peak_bytes)
        with (folder / "out.jsonl").open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                row = json.loads(line)
                assert (row["line"], row["id"]) == (number + 1, number)
                assert ("error" in row) == (number % 50 == 49)
        assert number + 1 == rows
        for _ in range(rows // 100):
            count("hundreds of rows in a soak of `predict`", WORKED)
    assert peaks[1] - peaks[0] < ALLOWED_BYTES


def resident_bytes(process):
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096


@contextmanager
def serving(stages, folder):
    """Address and process of `shotless serve` in `folder`; it has to end well when told to."""
    command = ["shotless", "serve", "--student", "cd", "--port", "0", "--threads", "1", "--log", "log.jsonl"]
    with ThreadPoolExecutor(1) as waiting:
        ended = waiting.submit(stages.run, folder, *command, seconds=36_000)
        said = ""
        while "running on" not in said:
            assert not ended.done(), ended.result().err
            time.sleep(0.05)
            said = stages.err_file.read_text("utf-8") if stages.err_file.is_file() else ""
        process = int(re.search(r"server process \[(\d+)\]", said)[1])
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+", said)[0], process
        finally:
            os.kill(process, signal.SIGTERM)
    assert ended.result().code in {0, -signal.SIGTERM}
    assert "Traceback" not in ended.result().err


def test_serve_under_many_clients_answers_each_its_own_and_keeps_its_memory(stages, trained, tmp_path):
    folder = copy(trained, tmp_path / "project")
    predictor = Predictor(folder / "artifacts/students/cd", 1)
    expected = dict(zip(TEXTS, predictor.predict(TEXTS), strict=True))

    def client(number, url, requests):
        """Asks, and checks that each answer is that of the text in its place."""
        dice = random.Random(number)
        for _ in range(requests):
            texts = dice.choices([*TEXTS, ""], k=dice.randrange(1, 20))
            request = urllib.request.Request(f"{url}/predict", json.dumps({"inputs": texts}).encode(), {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                found = json.load(answer)["predictions"]
            assert len(found) == len(texts)
            for text, row in zip(texts, found, strict=True):
                if text:
                    assert row["label"] == expected[text].label
                    assert row["confidence"] == pytest.approx(expected[text].confidence, abs=1e-5)
                else:
                    assert row["error"] == "text: empty"
            count("requests in a soak of `serve`", WORKED)
        return requests

    with serving(stages, folder) as (url, process), ThreadPoolExecutor(4) as clients:
        for turn in range(3):
            list(clients.map(client, range(turn * 4, turn * 4 + 4), [url] * 4, [15 * LARGER] * 4))
            if turn == 0:  # the first fills allocators and caches
                before = resident_bytes(process)
        assert resident_bytes(process) - before < ALLOWED_BYTES
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    assert all(row["label"] == expected[row["fields"]["text"]].label for row in logged if row["fields"]["text"])
