"""A real server, llama.cpp's, with the default model's GGUF: `make test-servers`, after `make run`, which leaves model and texts."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from conftest import PROJECT

from benchmarks.environments import llama_cpp_python
from benchmarks.teacher import GGUF, MODEL
from pipeline.files import Folders
from pipeline.params import ServerParams, load_params
from pipeline.schema import read_contexts, read_examples
from pipeline.task import Task
from pipeline.teachers import servers
from pipeline.teachers.scorer import Scorer
from pipeline.teachers.server_meeting import ask_server

pytestmark = pytest.mark.skipif(not os.environ.get("SHOTLESS_SERVERS"), reason="compiles llama.cpp; `make test-servers` runs it")
NAME, COMPARED, CAPTURED = "smollm2", 100, 200
LEAST_KNOWN, MOST_NATS, SAME_LABELS = 0.9, 0.3, 0.95  # against float32: llama.cpp rounds activations to 8 bits
PARTS_BEFORE_THE_KILL = 8
CAPTURE = f"from {__name__} import scored; scored(__import__('pathlib').Path())"


@pytest.fixture(scope="module")
def url():
    """The address of a server that runs, or of the one that the environment names."""
    if given := os.environ.get("SHOTLESS_SERVER_URL"):
        yield given
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", PROJECT / GGUF, "--model_alias", NAME, "--port", port, "--n_ctx", 2048, "--logits_all", True, "--verbose", False]
    process = subprocess.Popen([str(llama_cpp_python()), "-m", "llama_cpp.server", *map(str, options)], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/v1"
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        assert process.poll() is None, f"the server ended with {process.returncode}"
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def project(url, tmp_path, monkeypatch):
    """The working directory, where the server was met."""
    monkeypatch.chdir(tmp_path)
    ask_server(NAME, ServerParams(url=url, model=NAME), Folders.here())
    return tmp_path


def task():
    return Task(load_params(PROJECT / "params.yaml").task)


def examples(count):
    return read_examples(PROJECT / "artifacts" / "data" / "transfer.parquet", task().fields)[:count]


def context():
    return read_contexts(PROJECT / "artifacts" / "data" / "contexts" / "orders.parquet")[0]


def scored(work, count=CAPTURED):
    """Rows by the server that the working directory knows, and their store."""
    with Scorer(Folders.here().artifacts / "servers" / NAME, task(), work=work) as scorer:
        return scorer.score([context()], examples(count), "a real server"), scorer


def test_label_log_probabilities_are_those_of_float32(project):
    rows, _ = scored(project, COMPARED)
    with Scorer(PROJECT / MODEL, task(), work=None) as local:
        expected = local.label_scores([context()], examples(COMPARED), "float32")[0]
    found = np.array(rows["label_logprobs"].to_pylist())
    known = np.array([np.isnan(own or np.full(found.shape[1], np.nan)) for own in rows["label_bounds"].to_pylist()])
    apart = np.abs(found - expected)[known]
    same = (found.argmax(-1) == expected.argmax(-1)).mean()
    print(f"{COMPARED} texts, {known.mean():.1%} of labels known: at most {apart.max():.3f} nats apart, {apart.mean():.3f} on average")
    print(f"{same:.1%} the same labels")
    assert known.mean() > LEAST_KNOWN
    assert apart.max() < MOST_NATS
    assert same >= SAME_LABELS


def test_a_capture_that_was_killed_asks_for_no_stored_row_again(project, monkeypatch):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROJECT), *sys.path])}
    child = subprocess.Popen([sys.executable, "-c", CAPTURE], env=environment)
    while child.poll() is None and len(list(project.glob("scores/*/*.parquet"))) < PARTS_BEFORE_THE_KILL:
        time.sleep(0.1)
    assert child.poll() is None, "it ended before it could be killed"
    child.kill()
    child.wait()

    asked = []
    call = servers.Server.call
    monkeypatch.setattr(servers.Server, "call", lambda self, url, body=None: (asked.append(body), call(self, url, body))[1])
    with Scorer(Folders.here().artifacts / "servers" / NAME, task(), work=project) as scorer:
        prompts = {prompt.prompt_sha: prompt.request for prompt in scorer.tokens.prompts(context(), examples(CAPTURED))}
        with scorer.store.lock():
            lacking = set(scorer.store.missing(list(prompts)))
        assert 0 < len(lacking) < len(prompts)
        before = {row["prompt_sha"]: row for row in scorer.store.read(sorted(prompts.keys() - lacking)).to_pylist()}
        rows = scorer.score([context()], examples(CAPTURED), "after the kill").to_pylist()
    texts = [body["prompt"] for body in asked if body is not None]
    again = {sha for sha, prompt in prompts.items() if any(text.startswith(prompt) for text in texts)}
    print(f"killed with {len(before)} of {len(prompts)} rows; {len(again)} prompts asked after it")
    assert again == lacking
    assert len(rows) == CAPTURED
    assert [row["label_logprobs"] for row in rows if row["prompt_sha"] in before] == [
        before[row["prompt_sha"]]["label_logprobs"] for row in rows if row["prompt_sha"] in before
    ]
