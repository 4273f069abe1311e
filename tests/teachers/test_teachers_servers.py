"""Teachers behind servers: their labels against the same model asked here, faults, what a kill costs, keys, budgets, other models."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import PROJECT
from teachers.conftest import KEPT, TASK, TWO, World, example
from teachers.fake_server import MODEL, FakeServer
from teachers.test_teachers_chat import in_chat

from pipeline.cache import distributions
from pipeline.errors import MismatchError, ShotlessError, UsageError
from pipeline.evaluation.cost import measure_served
from pipeline.evaluation.predictions import models_of, predict
from pipeline.models.folders import load_model
from pipeline.params import CacheParams, ServerParams, StudentParams, TaskParams
from pipeline.schema import Context
from pipeline.students.train import train_student
from pipeline.targets.build import build_targets
from pipeline.task import Task
from pipeline.teachers import server_meeting, servers
from pipeline.teachers.scorer import Scorer
from pipeline.teachers.server_meeting import ask_server
from pipeline.teachers.server_rows import score_labels
from pipeline.teachers.servers import Said

CONTEXTS, TEXTS = [Context("shots/0"), TWO], ["a warm and funny film", "a dull, lifeless mess", "cold food", "late x"]
ROWS = len(CONTEXTS) * (2 + len(TEXTS))
FREE = {"template": TASK["template"], "completion": {"max_tokens": 8, "stop": ["o", "=r"]}}


class ServerWorld(World):
    """Captures of a teacher behind a fake server of the same tiny model that the world has in a folder."""

    def __init__(self, root, model_folder, url, **settings):
        super().__init__(root, model_folder)
        self.write_contexts(CONTEXTS)
        self.write_transfer(TEXTS)
        self.settings = {"url": url, "model": MODEL, "tokenizer": "models/tiny", "concurrency": 4, **settings}
        self.teacher = {}

    def params(self):
        params = super().params()
        servers_block = {"big": ServerParams.model_validate(self.settings)}
        teachers = params.teachers | {"few": params.teachers["few"].model_copy(update={"model": "servers/big"})}
        return params.model_copy(update={"servers": servers_block, "teachers": teachers})

    def writes(self):
        """The same with answers in free text."""
        self.task, self.teacher = FREE, {"cache": KEPT}
        return self

    def learn(self, form):
        """A student's loss at each step on the cache."""
        settings = {
            "base": "models/tiny",
            "learn_from": "teachers/few",
            "steps": 24,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "format": form,
        }
        students = {"s": StudentParams.model_validate(settings)}
        train_student("s", self.params().model_copy(update={"students": students}), self.folders)
        return pl.read_csv(self.folders.metrics / "curves" / "s.csv")["loss"].to_list()

    def meet(self):
        ask_server("big", ServerParams.model_validate(self.settings), self.folders)
        return json.loads((self.folders.artifacts / "servers/big/server.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def local(tmp_path_factory, model_folder):
    """Label log-probabilities of the same rows, scored here."""
    world = World(tmp_path_factory.mktemp("local"), model_folder("llama"))
    world.write_contexts(CONTEXTS)
    world.write_transfer(TEXTS)
    return np.array(world.capture().rows["label_logprobs"].to_pylist())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(servers, "LONGEST_WAIT_SECONDS", 0.02)


@pytest.fixture
def serve(tmp_path, model_folder, tokenizer, small_parts, quick):
    """`serve("vllm", …)` → a world and its running server."""
    running = []

    def start(kind, settings=(), seed=0, **habits):
        folder = model_folder("llama", seed=seed)
        server = FakeServer(kind, load_model(folder), tokenizer, **habits)
        context = server.running()
        url = context.__enter__()
        running.append(context)
        return ServerWorld(tmp_path / f"server{len(running)}", folder, url, **dict(settings)), server

    yield start
    for context in running:
        context.__exit__(None, None, None)


def check_labels(rows, local):
    """Which labels are known; these are right, and the others' bounds hold."""
    values, bounds = np.array(rows["label_logprobs"].to_pylist()), rows["label_bounds"].to_pylist()
    bounds = np.array([own or [math.nan] * 3 for own in bounds])
    known = np.isnan(bounds)
    assert values[known] == pytest.approx(local[known], abs=1e-3)
    assert (local[~known] <= bounds[~known] + 1e-3).all()
    assert (values[~known] <= bounds[~known] + 1e-6).all()
    return known


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama_cpp", "openai"])
@pytest.mark.slow
def test_labels_are_those_of_the_model_itself(serve, local, kind):
    """Labels of several tokens, and outside of the most probable tokens: each kind gives any token's log-probability in its own way."""
    world, _ = serve(kind, listed=5)
    found = world.meet()["found"]
    assert (found["kind"], found["exact"]) == (kind, True)
    cache = world.capture()
    known = check_labels(cache.rows, local)
    assert known[:, 1:].all()  # all but the unlikely one of several tokens
    assert cache.manifest["engines"][0]["name"] == "server"
    assert cache.manifest["cache"]["encoding"] == "top_k_tail"
    row = cache.rows.to_pylist()[0]
    assert len(row["topk_ids"][0]) == (4 if kind == "openai" else 5)  # the text of one is that of another token too
    assert row["tail_mass"][0] == pytest.approx(1 - np.exp(row["topk_logprobs"][0]).sum(), abs=0.1)


@pytest.mark.slow
def test_the_same_without_exact_tokens_has_bounds_that_hold(serve, local):
    world, _ = serve("vllm", exact=False, listed=20)
    assert not world.meet()["found"]["exact"]
    rows = world.capture().rows
    known = check_labels(rows, local)
    assert 0 < known[:, 1:].mean() < 1
    figures = json.loads(world.metrics())
    assert figures["censored_labels"] == pytest.approx((~known).mean(), abs=1e-5)
    assert 0 < figures["censored_mass"] <= figures["censored_mass_most"] <= 1
    assert figures["moved_most"] < 1e-5


@pytest.mark.slow
def test_a_server_that_tokenises_is_sent_text(serve, local):
    world, server = serve("openai", {"tokenizer": None})
    found = world.meet()["found"]
    assert found["exact"]
    rows = world.capture().rows
    check_labels(rows, local)
    assert rows["topk_ids"].to_pylist() == [[[]]] * ROWS
    assert all(isinstance(body["prompt"], str) for path, body in server.asked if path == "/v1/completions")


@pytest.mark.slow
def test_a_server_for_chat_alone_gets_one_message_and_labels_without_their_space(serve):
    world, server = serve("openai", {"tokenizer": None}, completions=False)
    assert world.meet()["found"]["chat_alone"]
    rows = world.capture().rows
    assert len(rows) == ROWS
    assert np.isfinite(np.array(rows["label_logprobs"].to_pylist())).all()
    assert {path for path, _ in server.asked} >= {"/v1/chat/completions"}


@pytest.mark.parametrize("fault", [429, 500, "cut", "slow", "text"])
@pytest.mark.slow
def test_what_passes_is_asked_again(serve, local, fault):
    world, server = serve("sglang", {"timeout_seconds": 1.0} if fault == "slow" else {})
    world.meet()
    server.faults = [None] * 5 + [fault] * 2
    rows = world.capture().rows
    assert not server.faults
    check_labels(rows, local)


@pytest.fixture(scope="module")
def local_text(tmp_path_factory, model_folder):
    """The same answers, written here."""
    world = World(tmp_path_factory.mktemp("text"), model_folder("llama", seed=2))
    world.write_contexts(CONTEXTS)
    world.write_transfer(TEXTS)
    world.task, world.teacher = FREE, {"cache": KEPT, "dtype": "float32"}
    return world.capture().rows.to_pylist()


def is_hard(row):
    return row["topk_ids"] == [[token] for token in row["completion_ids"]] and not any(row["tail_mass"])


@pytest.mark.parametrize(
    ("kind", "sends"), [*((kind, "ids") for kind in ("vllm", "sglang", "llama_cpp", "openai")), ("llama_cpp", "text"), ("openai", "text")]
)
@pytest.mark.slow
def test_free_text_is_what_the_model_itself_writes(serve, local_text, tokenizer, kind, sends):
    """Ends of one token, of two, and none; servers that show the end and that cut it off; tokens that no text tells apart."""
    world, server = serve(kind, {"sends": sends}, seed=2)
    world.writes().meet()
    before = len(server.asked)
    rows = world.capture().rows.to_pylist()
    hard = [is_hard(row) for row in rows]
    for row, own, is_text in zip(rows, local_text, hard, strict=True):
        if is_text:
            text = tokenizer.decode(own["completion_ids"]).strip()
            assert "\ufffd" in text
            assert tokenizer.decode(row["completion_ids"])[:9] == f" {text}"[: len(tokenizer.decode(row["completion_ids"]))][:9]
            continue
        assert row["completion_ids"] == own["completion_ids"]
        assert row["completion_logprobs"] == pytest.approx(own["completion_logprobs"], abs=1e-3)
        for ids, values, own_ids, own_values in zip(
            *(each[name] for each in (row, own) for name in ("topk_ids", "topk_logprobs")), strict=True
        ):
            found, expected = dict(zip(ids, values, strict=True)), dict(zip(own_ids, own_values, strict=True))
            shared = found.keys() & expected
            assert len(shared) == 5 or kind == "openai" or sends == "text"
            assert [found[token] for token in shared] == pytest.approx([expected[token] for token in shared], abs=1e-3)
    assert sum(hard) == 0 if kind != "openai" and sends == "ids" else 0 < sum(hard) < len(rows)
    figures = json.loads(world.metrics())
    assert figures["hard_answers"] == pytest.approx(np.mean(hard), abs=1e-5)
    assert figures["changed_answers"] == 0
    assert figures["positions"] == sum(len(row["completion_ids"]) for row in rows)
    answers = 2 * len(rows)  # fidelity asks them all again
    assert len(server.asked) - before - 3 <= answers * (1 if kind in {"vllm", "sglang"} else 3)


@pytest.mark.parametrize("form", ["plain", "chat"])
@pytest.mark.slow
def test_a_service_for_chat_alone_writes_answers_that_a_student_learns(serve, tokenizer, monkeypatch, form):
    """Of a conversation the tokens are kept, if each is one of the tokenizer's, and the end for certain; else the text is learnt, as a
    plain prompt's answer always is.
    """
    monkeypatch.setattr(distributions, "LEAST_RETAINED", 0.0)  # random models are never sure
    world, server = serve("openai", {"sends": "text", "price": {"input": 0.0, "output": 1e6}}, seed=2, completions=False)
    in_chat(world.model)
    world.write_contexts([replace(context, format=form) for context in CONTEXTS])
    assert world.writes().meet()["found"]["chat_alone"]
    before = len(server.asked)
    rows = world.capture().rows.to_pylist()
    asked = [body for _, body in server.asked[before + 3 :]]
    said = {}
    for body in asked:
        tokens, _, shown, _ = server.written(server.tokens("".join(f"{one['role']}: {one['content']}\n" for one in body["messages"])), body)
        said.setdefault(tokenizer.decode(tokens[:shown]).strip(), tokens[:shown])
    apart = [text for text in said if "\ufffd" not in text]
    assert 0 < len(apart) < len(said)
    for row in rows:
        ids, end = row["completion_ids"], "<|end|>" if form == "chat" else "o"
        if form == "plain":
            assert is_hard(row)
            assert tokenizer.decode(ids) in {f" {text}{end}" for text in said} or len(ids) == 8
        elif not is_hard(row):
            assert ids[:-1] in [said[text] for text in apart] or ids in [said[text] for text in apart]
            assert ids[-1] == tokenizer.eos_token_id or len(ids) == 8
    assert any(map(is_hard, rows))
    assert form == "plain" or not all(map(is_hard, rows))
    losses = world.learn(form)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_answers_in_free_text_cost_what_they_may_and_what_they_did(serve, capfd):
    world, _ = serve("sglang", {"price": {"input": 0.0, "output": 1e6}, "budget": 20.0, "concurrency": 1}, seed=2)
    world.writes().meet()
    with pytest.raises(ShotlessError, match=r"servers\.big\.budget: 20, and [\d.]+ are spent: the next request could pass it"):
        world.capture()
    kept = [row for part in sorted(world.folders.work.glob("scores/*/part-*.parquet")) for row in pl.read_parquet(part)["completion_ids"]]
    assert 20 - 8 - 1 < sum(map(len, kept)) + 3 <= 20  # the probe's three tokens are paid too
    assert "8 to 8 requests, 192 prompt tokens or more, 8.00 to 64.00 in money" in capfd.readouterr().out


def changed(**changes):
    def change(reply):
        return {"meta_info": reply["meta_info"] | changes}

    return change


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (changed(prompt_tokens=3), r"servers\.big: the server answered with 3 tokens for a prompt of \d+ token ids"),
        (changed(output_top_logprobs=[[[math.nan, 1, None]]]), "nan as a log-probability"),
        (changed(output_top_logprobs=[[[0.5, 1, None]]]), "0.5 as a log-probability"),
        (changed(output_top_logprobs=[[[-0.1, 1, None], [-0.1, 2, None]]]), "probabilities that sum to 1.810"),
        (changed(output_top_logprobs=[[]]), "an answer without log-probabilities"),
        (lambda reply: [reply], "list in place of an object"),
        (lambda reply: reply | {"model": "tiny-2"}, "is of model 'tiny-2', and the stage `server` met 'tiny-1'"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_right_is_refused_and_what_was_answered_is_kept(serve, local, fault, message):
    world, server = serve("sglang")
    world.meet()
    if "tiny-2" in message:
        path = world.folders.artifacts / "servers/big/server.json"
        path.write_text(path.read_text("utf-8").replace('"reports": ""', '"reports": "tiny-1"'), "utf-8")
    server.faults = [None] * 16 + [fault]
    with pytest.raises(ShotlessError, match=message):
        world.capture()
    kept = world.scored()
    assert 0 < len(kept) < ROWS
    before = len(server.asked)
    check_labels(world.capture().rows, local)
    assert len(world.scored()) == len(set(world.scored())) == ROWS
    assert (
        len(server.asked) - before < 2 * 3 + 4 * (ROWS - len(kept)) + 4 * ROWS
    )  # probes, rows that lacked, fidelity, which asks few rows twice


def test_nothing_answers(serve):
    world, server = serve("vllm")
    world.meet()
    server.faults = [503] * 400
    with pytest.raises(ShotlessError, match=r"servers\.big: .*/v1/completions gave no answer in 8 attempts, at last: status 503"):
        world.capture()


@pytest.mark.slow
def test_a_redirect_is_not_followed_and_the_key_is_nowhere(serve, monkeypatch, capfd):
    monkeypatch.setenv("BIG_KEY", "sk-very-secret")
    world, server = serve("vllm", {"key_env": "BIG_KEY"})
    world.meet()
    assert all(headers["Authorization"] == "Bearer sk-very-secret" for headers in server.headers)
    with closing(server_meeting.open_server(world.folders.artifacts / "servers/big")) as opened:
        assert "secret" not in repr([opened, opened.settings, opened.found])
    server.faults = ["redirect"]
    with pytest.raises(UsageError, match=r"sends on to 'http://elsewhere\.example/v1'\. It is not followed"):
        world.capture()
    server.faults = [lambda reply: reply | {"model": "sk-very-secret"}]
    with pytest.raises(MismatchError, match="is of model '…'"):
        world.capture()
    server.faults = [401]
    with pytest.raises(UsageError, match=r"refuses access.*the key is in \$BIG_KEY"):
        world.capture()
    world.capture()
    shown = "".join(capfd.readouterr())
    written = [
        file.read_bytes()
        for root in (world.folders.artifacts, world.folders.metrics, world.folders.work)
        for file in root.rglob("*")
        if file.is_file()
    ]
    assert "secret" not in shown
    assert not any(b"secret" in content for content in written)
    monkeypatch.delenv("BIG_KEY")
    with pytest.raises(UsageError, match=r"servers\.big\.key_env: the environment variable BIG_KEY is not set"):
        world.capture()


@pytest.mark.slow
def test_another_model_is_another_teacher(serve):
    world, server = serve("vllm")
    world.meet()
    world.capture()
    server.shift = 5.0
    world.write_transfer([*TEXTS, "one more"])
    with pytest.raises(MismatchError, match=r"answers otherwise than when it was met(.|\n)*then: \[\[(.|\n)*now:  \[\["):
        world.capture()
    world.meet()
    before = len(set(world.scored()))
    world.capture()
    assert len(world.scored()) == before + ROWS + len(CONTEXTS)  # all is asked again, in a store of its own


@pytest.mark.slow
def test_a_little_drift_is_the_same_teacher(serve):
    world, server = serve("vllm")
    first = world.meet()
    world.capture()
    rows = world.bytes()
    server.shift = 0.05
    assert world.meet() == first
    asked = len(server.asked)
    world.capture()
    assert world.bytes() == rows
    assert len(server.asked) == asked


@pytest.mark.slow
def test_the_budget_stops_before_it_is_passed(serve, capfd):
    price = {"input": 1e6 / 40, "output": 0.0}  # a prompt of 40 tokens costs one
    world, _ = serve("sglang", {"price": price, "budget": 1.0, "concurrency": 1})
    world.meet()
    with pytest.raises(UsageError, match=r"servers\.big\.budget: 1, and \d+ rows cost [\d.]+ or more"):
        world.capture()
    assert not world.scored()
    said = capfd.readouterr().out
    assert f"servers.big: {ROWS} to " in said
    assert " requests, " in said
    world.settings["budget"] = 12.0
    world.meet()
    with pytest.raises(ShotlessError, match=r"servers\.big\.budget: 12, and [\d.]+ are spent: the next request could pass it"):
        world.capture()
    kept = world.scored()
    assert kept
    world.settings["budget"] = 500.0
    world.meet()
    world.capture()
    assert len(world.scored()) == len(set(world.scored()))
    assert set(kept) < set(world.scored())


@pytest.mark.slow
def test_requests_at_a_time_are_bounded(serve):
    world, server = serve("sglang", {"concurrency": 2})
    world.meet()
    world.capture()
    assert server.most_inside == 2


def test_a_server_without_log_probabilities_is_refused_with_what_to_do(serve):
    world, _ = serve("openai", {"tokenizer": None}, completions=False, listed=0)
    with pytest.raises(UsageError, match=r"servers\.big: no log-probabilities(.|\n)*Start vLLM, SGLang or llama-server"):
        world.meet()
    world, _ = serve("openai", ids=False)
    with pytest.raises(UsageError, match=r"no log-probabilities behind token ids\. Set `sends: text`"):
        world.meet()
    world, _ = serve("vllm", {"model": "other"})
    with pytest.raises(UsageError, match=r"servers\.big\.model: the server has no 'other'; it has: tiny-1"):
        world.meet()


@pytest.mark.slow
def test_a_baseline_asks_the_server_and_its_cost_is_measured_as_asked(serve):
    world, server = serve("vllm")
    world.meet()
    world.capture()
    params = world.params()
    targets = {"t": params.targets["t"].model_copy(update={"teachers": {"few": 1.0}})}
    params, task = params.model_copy(update={"targets": targets}), Task(params.task)
    build_targets("t", targets["t"], task, world.folders)
    sets = {"e": [replace(example(text), label="positive") for text in ("a strange film", "bored")]}
    models = models_of("b", params, world.folders)
    table = predict("b", models, params, world.folders, sets)
    assert [sum(row) for row in table["probabilities"].to_pylist()] == pytest.approx([1, 1])
    asked = len(server.asked)
    assert predict("b", models, params, world.folders, sets).equals(table)
    assert len(server.asked) == asked
    figures = measure_served(models, params, sets["e"], 1)
    assert figures["measured"]["device"] == "server"
    assert figures["latency_ms"] > 0
    assert figures["forward_passes"] == len(CONTEXTS)
    server.shift = 5.0
    with pytest.raises(MismatchError, match="answers otherwise"):
        measure_served(models, params, sets["e"], 1)


RECORDED = Path(__file__).with_name("llama_cpp_python.json")


class Recorded(FakeServer):
    """Answers as llama-cpp-python 0.3.36 answered the same requests, with SmolLM2-135M-Instruct in 4 bits."""

    def __init__(self):
        super().__init__("openai", None, None)
        self.exchange = json.loads(RECORDED.read_text("utf-8"))

    def reply(self, path, body):
        return next((own["status"], own["reply"]) for own in self.exchange if (own["path"], own["body"]) == (path, body))


def asked(url, world):
    """What a server says of two reviews: their labels' log-probabilities, and a free answer to each."""
    settings = ServerParams(url=url, model="smollm2", tokenizer="models/tiny", sends="text")
    ask_server("llama", settings, world.folders)
    folder, reviews = world.folders.artifacts / "servers/llama", [example("a warm and funny film"), example("a dull, lifeless mess")]
    labels = {"verbalisers": {"negative": " negative", "positive": " positive"}}
    free = {"completion": {"max_tokens": 6, "stop": ["\n"]}}
    found = []
    for answers in (labels, free):
        task = Task(TaskParams.model_validate({"template": TASK["template"], **answers}))
        with Scorer(folder, task, CacheParams(encoding="top_k_tail", top_k=5), work=None) as scorer:
            found.append(scorer.score([Context("none")], reviews, "a recorded server"))
    return found


def test_a_real_server_s_recorded_answers_are_understood(tmp_path, model_folder, tokenizer, monkeypatch, capfd):
    monkeypatch.setattr(server_meeting, "MORE", ())
    world = World(tmp_path, model_folder("llama"))
    with Recorded().running() as url:
        labels, texts = (table.to_pylist() for table in asked(url, world))
    # its echo is wrong by one place, so that it is not used
    assert "openai, model 'smollm2': lists the 20 most probable tokens, and of labels outside a bound" in capfd.readouterr().out
    assert labels[0]["label_logprobs"] == pytest.approx([-4.790462, -2.650722], abs=1e-5)
    assert labels[0]["label_bounds"] == []
    assert labels[1]["label_logprobs"][0] == pytest.approx(-1.883036, abs=1e-5)
    # a token " positive" is not listed, and " " is: behind it "positive" is not listed either, which says little
    listed = next(own["reply"] for own in Recorded().exchange if "lifeless" in str(own["body"]))["choices"][0]["logprobs"]["top_logprobs"][
        0
    ]
    assert labels[1]["label_bounds"] == pytest.approx([math.nan, min(listed.values())], abs=0.01, nan_ok=True)
    assert labels[1]["label_logprobs"][1] <= labels[1]["label_bounds"][1]
    assert is_hard(texts[0])
    assert tokenizer.decode(texts[0]["completion_ids"]) == ' "Aweso'  # six tokens of this tokenizer, which has no ` "`
    assert not is_hard(texts[1])
    assert tokenizer.decode(texts[1]["completion_ids"]) == " negative\n"
    assert texts[1]["completion_logprobs"] == pytest.approx([-1.883036, -0.107626], abs=1e-5)


def scored(root):
    """Rows of a capture of labels."""
    with Scorer(root / "artifacts/servers/big", Task(TaskParams.model_validate(TASK)), work=root / "work") as scorer:
        return scorer.score(CONTEXTS, [example(text) for text in TEXTS], "killed")


@pytest.mark.slow
def test_a_capture_that_was_killed_asks_for_no_stored_row_again(serve):
    world, server = serve("sglang")
    world.meet()
    root, release = world.folders.work.parent, threading.Event()
    server.faults = [None] * 14 + [lambda reply: reply if release.wait(300) else None] * 100  # the rest is answered too late
    code = "import sys; from pathlib import Path; from teachers.test_teachers_servers import scored; scored(Path(sys.argv[1]))"
    places = {"PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests"), *sys.path])}
    child = subprocess.Popen([sys.executable, "-c", code, str(root)], env=os.environ | places)
    while child.poll() is None and not world.scored():
        time.sleep(0.05)
    child.kill()
    child.wait()
    release.set()
    server.faults, before, kept = [], len(server.asked), world.scored()
    rows = scored(root)
    again = [tuple(body["input_ids"]) for path, body in server.asked[before + 3 :]]  # behind the probe, one of whose prompts is a text
    with Scorer(root / "artifacts/servers/big", Task(TaskParams.model_validate(TASK)), work=None) as scorer:
        prompts = {one.prompt_sha: one.ids for context in CONTEXTS for one in scorer.tokens.prompts(context, [example(t) for t in TEXTS])}
    lacking = {ids for sha, ids in prompts.items() if sha not in kept}
    assert 0 < len(lacking) < len(prompts) == len(rows)
    assert {ids for ids in prompts.values() if any(one[: len(ids)] == ids for one in again)} == lacking
    assert sorted(world.scored()) == sorted(prompts)


class Told:
    """A server that says what it is told of each beginning; all else has one other token."""

    def __init__(self, said):
        self.said, self.asked = said, []

    def next_token(self, prompt, behind, wanted=()):
        self.asked.append(behind)
        logprobs = {token: math.log(p) for token, p in self.said[behind].items()}
        return Said(logprobs, min(logprobs.values()), 1)


def test_censored_labels_share_the_mass_that_is_missing_and_stay_under_the_floor():
    server = Told({(): {1: 0.6, 9: 0.1}})
    values, bounds, _ = score_labels(server, None, [(1,), (2,), (3,)])
    assert np.exp(values) == pytest.approx([0.6, 0.1, 0.1])  # 0.3 is missing for two, and none is over 0.1
    assert np.exp(bounds[1:]) == pytest.approx([0.1, 0.1])
    assert math.isnan(bounds[0])


def test_labels_that_begin_alike_are_told_apart_behind_their_beginning_if_they_matter():
    server = Told({(): {1: 0.6, 2: 0.3, 3: 1e-5}, (1,): {5: 0.9, 6: 0.1}})
    values, bounds, _ = score_labels(server, None, [(1, 5), (1, 6), (2,), (3, 5), (3, 6)])
    assert server.asked == [(), (1,)]
    assert np.exp(values) == pytest.approx([0.54, 0.06, 0.3, 5e-6, 5e-6])
    assert np.exp(bounds[3:]) == pytest.approx([1e-5, 1e-5])
    texts = Told({"": {" ": 0.1, " card": 0.7, " c": 0.1}, " card": {" arrival": 0.5, " link": 0.4}, " card link": {"ing": 0.9}})
    values, bounds, _ = score_labels(texts, None, [" card arrival", " card linking"])
    assert np.exp(values) == pytest.approx([0.35, 0.7 * 0.4 * 0.9])
    texts = Told({"": {" ": 0.2, " good": 0.6, " x": 0.15}, " ": {"bad": 0.1, "y": 0.05}})
    values, bounds, _ = score_labels(texts, None, [" good", " bad"])  # a token " bad" may have all that is missing
    assert np.exp(values) == pytest.approx([0.6, 0.025])
    assert np.exp(bounds[1]) == pytest.approx(0.05 + 0.02)
    texts = Told({"": {" ": 0.1, " card": 0.7, " c": 0.1}})
    values, bounds, _ = score_labels(texts, None, [" card arrival", " card linking"], goes_on=False)
    assert np.exp(values) == pytest.approx([0.35, 0.35])
    assert np.exp(bounds) == pytest.approx([0.7, 0.7])
