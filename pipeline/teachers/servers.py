"""Teachers behind servers: vLLM, SGLang, llama.cpp's, and others that speak OpenAI's protocol and give log-probabilities.

Each server answers one question, `next_token`: the log-probabilities of what may come after a prompt. A label's score is asked token by
token behind what it begins with, which a server's prefix cache serves; labels that cannot matter any more are not asked further. A server
that lists only its most probable tokens leaves labels *censored*: known to be no more probable than a bound (`schema.STORED`).

vLLM and SGLang were built to their documented fields, llama.cpp was run (docs/teachers.md). The key is in the headers of requests alone.
"""

import heapq
import json
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import numpy as np
import pyarrow as pa
import torch
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from pipeline.cache.encodings import Encoded, rounded
from pipeline.errors import MismatchError, ShotlessError, UsageError, choices
from pipeline.files import Folders, read_json, write_json
from pipeline.models.folders import SERVER, load_tokenizer, server_of, tokenizer_sha256
from pipeline.params import CacheParams, ServerParams
from pipeline.params.methods import SERVER_TOP as TOP
from pipeline.schema import STORED, Prompt
from pipeline.task import TaskTokens
from pipeline.teachers.engines import Scores
from pipeline.teachers.scorer import Job, stored_rows

ATTEMPTS = 8
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
WRITE_SECONDS, WRITE_ROWS = 2.0, 256  # between two writes: what a kill costs at most
NO_PROBABILITY = -100.0  # nats: servers write it as -inf, as -9999 or as float32's lowest
ROUNDING = 1e-3  # nats over 0 that a log-probability may have
LEAST_MASS = 1e-9  # of what a server does not list, since its numbers are rounded
NEGLIGIBLE_NATS = math.log(1e4)  # below the best label: a label's further tokens are not asked for
DRIFT_NATS = 0.25  # that probe answers may move: servers' batches change the last bits, other weights change more
PROBES = ("The capital of France is", "2 + 2 =", "Review: a warm and funny film\nSentiment:")
PROBE_TOP = 5
MORE = (2000, 100)  # that a server which gives no other tokens is asked for
UNLISTED = (" Zanzibar", " hexagon")  # texts that the first probe's answer does not begin with

Token = int | str  # its id, or its text if the server tokenises
Label = Sequence[int] | str


@dataclass(frozen=True)
class Said:
    """What a server says of one token: log-probabilities in nats, over the whole vocabulary."""

    logprobs: dict[Token, float]
    floor: float  # of the least probable one that is listed among the most probable: most that any other can be
    prompt_tokens: int

    @property
    def log_missing(self) -> float:
        """Log of the probability of all tokens that it says nothing of."""
        return math.log(max(1 - math.fsum(map(math.exp, self.logprobs.values())), LEAST_MASS))


class NotOfferedError(ShotlessError):
    """The server has no such path, or refuses what was asked."""


class _BusyError(Exception):
    def __init__(self, why: str, seconds: float = 0.0) -> None:
        super().__init__(why)
        self.seconds = seconds  # that the server asks to wait


def _wait_seconds(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    return max(wait_exponential_jitter(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS)(state), getattr(error, "seconds", 0.0))


class _Gate:
    """Lets so many requests through at a time as the server bears: half after a refusal, one more after as many answers."""

    def __init__(self, most: int) -> None:
        self._most, self._limit, self._inside, self._changed = most, float(most), 0, threading.Condition()

    @contextmanager
    def passed(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._inside < int(self._limit))
            self._inside += 1
        answered = False
        try:
            yield
            answered = True
        finally:
            with self._changed:
                self._inside -= 1
                self._limit = min(self._most, self._limit + 1 / self._limit) if answered else max(1.0, self._limit / 2)
                self._changed.notify_all()


class Server:
    """A server of OpenAI's protocol; its kinds differ in how they are asked for the next token. Several threads may use it.

    `name` is that in params.yaml. `found` is what the stage `server` found; empty before.
    """

    kind: ClassVar[str] = "openai"
    owner: ClassVar[str] = ""  # who owns the models that a server of this kind lists
    way: ClassVar[str] = "repeats prompts with log-probabilities (echo), so that every label's is exact, for a request each"

    def __init__(self, name: str, settings: ServerParams, found: dict[str, Any], tokenizer: Any = None) -> None:
        """Raises UsageError if the environment variable with the key is not set."""
        self.where, self.settings, self.found, self.tokenizer = f"servers.{name}", settings, found, tokenizer
        self._key, headers = "", {}
        if settings.key_env is not None:
            self._key = os.environ.get(settings.key_env, "")
            if not self._key:
                raise UsageError(f"{self.where}.key_env: the environment variable {settings.key_env} is not set. Put the key into it.")
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx2.Client(headers=headers, timeout=settings.timeout_seconds, follow_redirects=False)
        self.attempts = ATTEMPTS if found else 3  # a server that refuses what it lacks with status 500 is met soon
        self._gate, self._lock = _Gate(settings.concurrency), threading.Lock()
        self.requests, self.tokens = 0, [0, 0]  # of prompts and of answers, so far
        self.reports = str(found.get("reports", ""))  # the model that answers say they are of

    @property
    def root(self) -> str:
        """The server's address without the version of OpenAI's protocol."""
        return self.settings.url.rstrip("/").removesuffix("/v1")

    @property
    def top(self) -> int:
        """Most probable tokens that it is asked for."""
        return self.found.get("top", TOP)

    @property
    def spent(self) -> float:
        """Money so far; 0 without a price."""
        return self.cost(*self.tokens)

    def cost(self, prompt_tokens: float, answer_tokens: float) -> float:
        """Money for so many tokens; 0 without a price."""
        price = self.settings.price
        return 0.0 if price is None else (prompt_tokens * price.input + answer_tokens * price.output) / 1e6

    @cached_property
    def ids(self) -> dict[str, int]:
        """Text → token id, of tokens whose text no other token has."""
        texts = self.tokenizer.batch_decode([[number] for number in range(len(self.tokenizer))])
        found: dict[str, int] = {}
        for number, text in enumerate(texts):
            found[text] = -1 if text in found else number
        return {text: number for text, number in found.items() if number >= 0}

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def call(self, url: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a request is answered with; asked again while the server is busy or out of reach.

        Raises UsageError for a refused key and for a redirect, NotOfferedError for what the server does not know, ShotlessError after
        `attempts` attempts.
        """
        kinds = retry_if_exception_type((httpx2.TransportError, _BusyError))
        try:
            return Retrying(retry=kinds, wait=_wait_seconds, stop=stop_after_attempt(self.attempts), reraise=True)(self._once, url, body)
        except (httpx2.TransportError, _BusyError) as error:
            raise ShotlessError(
                f"{self.where}: {url} gave no answer in {self.attempts} attempts, at last: {self._hidden(str(error) or repr(error))}. "
                "What was answered before is kept: see to the server and run again."
            ) from None

    def _once(self, url: str, body: dict[str, Any] | None) -> Any:
        deadline = time.monotonic() + self.settings.timeout_seconds
        with self._gate.passed(), self._client.stream("GET" if body is None else "POST", url, json=body) as response:
            pieces = []
            for piece in response.iter_bytes():
                pieces.append(piece)
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"the answer was not whole after {self.settings.timeout_seconds:g} s")
            text = self._hidden(b"".join(pieces).decode("utf-8", "replace"))
            self._check(url, response, text)
            try:
                return json.loads(text)
            except ValueError:
                raise _BusyError(f"an answer that is not JSON: {text[:100]!r}") from None

    def _check(self, url: str, response: httpx2.Response, text: str) -> None:
        status = response.status_code
        if status == 429 or status >= 500:
            after = response.headers.get("retry-after", "")
            raise _BusyError(f"status {status}: {text[:200]}", float(after) if after.isdecimal() else 0.0)
        if response.is_redirect:
            to = self._hidden(response.headers.get("location", ""))
            raise UsageError(
                f"{self.where}: {url} sends on to {to!r}. It is not followed, with a key or without; if it is right, set it as url."
            )
        if status in {401, 403}:
            key = "no key_env is set" if self.settings.key_env is None else f"the key is in ${self.settings.key_env}"
            raise UsageError(f"{self.where}: {url} refuses access (status {status}: {text[:200]}); {key}. Set or correct the key.")
        if status >= 400:
            raise NotOfferedError(f"{self.where}: {url} answers with status {status}: {text[:300]}")

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text

    def next_token(self, prompt: Prompt, behind: Label, wanted: Iterable[Token] = ()) -> Said:
        """Log-probabilities of what follows a prompt and the beginning of an answer: of the `top` most probable tokens, and of those
        `wanted` as far as the server gives them. Raises ShotlessError if an answer is not of what was asked.
        """
        said = self._top(prompt, behind)
        if self.found.get("exact") and (missing := [token for token in wanted if token not in said.logprobs]):
            said = Said(said.logprobs | self.exactly(prompt, behind, missing), said.floor, said.prompt_tokens)
        return said

    def _top(self, prompt: Prompt, behind: Label) -> Said:
        if self.is_chat(prompt):
            turns = prompt.request if isinstance(prompt.request, tuple) else [("user", prompt.request)]
            messages = [{"role": role, "content": content} for role, content in turns or ()]
            reply = self._asked("/chat/completions", {"messages": messages, "logprobs": True, "top_logprobs": self.top})
        else:
            reply = self._asked("/completions", self._body(prompt, behind))
        return self._said(_choice(reply), prompt, behind, _usage(reply))

    def _body(self, prompt: Prompt, behind: Label) -> dict[str, Any]:
        return {"prompt": _behind(prompt, behind), "logprobs": self.top}

    def exactly(self, prompt: Prompt, behind: Label, wanted: list[Token]) -> dict[Token, float]:
        """Each by itself, behind a prompt that the server repeats with log-probabilities (`echo`): token ids, or texts of any length.

        A text whose tokens are not apart from those before it is left out.
        """
        found: dict[Token, float] = {}
        for token in wanted:
            before = _behind(prompt, behind)
            whole = before + token if isinstance(token, str) else [*before, token]
            reply = self._asked("/completions", {"prompt": whole, "echo": True, "logprobs": 1})
            about = _choice(reply).get("logprobs") or {}
            values, starts = about.get("token_logprobs") or [], about.get("text_offset") or []
            own = [len(before)]
            if isinstance(token, str):
                own = [at for at, start in enumerate(starts) if len(before) <= start < len(whole)]
                if not own or starts[own[0]] != len(before):
                    continue
            if len(values) <= own[-1]:
                raise self._wrong(f"{len(values)} log-probabilities of a prompt of {len(whole)} tokens")
            found[token] = sum(self._checked(values[at]) for at in own)
        return found

    def is_chat(self, prompt: Prompt) -> bool:
        """Whether a prompt is sent as chat messages, so that its answer cannot be begun and has no space before it."""
        return isinstance(prompt.request, tuple) or (prompt.request is not None and bool(self.found.get("chat_alone")))

    def _asked(self, path: str, body: dict[str, Any], root: str | None = None) -> Any:
        """A reply to a request for one token; its tokens are counted, and the model that it says it is of is compared."""
        own = {"model": self.settings.model, "max_tokens": 1, "temperature": 1.0, "stream": False} if root is None else {}
        reply = self.call((self.settings.url.rstrip("/") if root is None else root) + path, {**own, **body})
        if not isinstance(reply, dict):
            raise self._wrong(f"{type(reply).__name__} in place of an object")
        model = str(reply.get("model") or "")
        if self.found and model and self.reports and model != self.reports:
            raise MismatchError(
                f"{self.where}: an answer is of model {model!r}, and the stage `server` met {self.reports!r}. Start that one, or run "
                f"`dvc repro --force server@{self.where.partition('.')[2]}`, which makes it another teacher."
            )
        self.reports = self.reports or model
        with self._lock:
            self.requests += 1
            self.tokens = [self.tokens[0] + _usage(reply), self.tokens[1] + 1]
        return reply

    def _said(self, choice: dict[str, Any], prompt: Prompt, behind: Label, counted: int) -> Said:
        """From a choice's `logprobs`, in either of OpenAI's two forms."""
        logprobs = choice.get("logprobs") or {}
        if logprobs.get("content"):
            listed = {_text_of(entry): entry.get("logprob") for entry in logprobs["content"][0].get("top_logprobs") or ()}
        else:
            listed = dict((logprobs.get("top_logprobs") or [{}])[0] or {})
        tokens = {self._token(text): value for text, value in listed.items()}
        return self._listed(tokens, prompt, behind, counted)

    def _listed(self, given: dict[Token, Any], prompt: Prompt, behind: Label, counted: int) -> Said:
        """What a server listed, checked. Raises NotOfferedError if that is nothing, ShotlessError if it cannot be."""
        if not given:
            raise NotOfferedError(f"{self.where}: an answer without log-probabilities")
        if prompt.request is None and counted and counted != (own := len(prompt.ids) + len(behind)):
            raise self._wrong(f"{counted} tokens for a prompt of {own} token ids")
        logprobs = {token: self._checked(value) for token, value in given.items()}
        if (mass := math.fsum(map(math.exp, logprobs.values()))) > 1 + 1e-2:
            raise self._wrong(f"probabilities that sum to {mass:.3f}")
        return Said(logprobs, min(logprobs.values()), counted)

    def _token(self, text: str) -> Token:
        """The id of a token by its text, if prompts are ids and one token alone has this text."""
        if text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        return text if self.tokenizer is None else self.ids.get(text, text)

    def _checked(self, value: Any) -> float:
        if not isinstance(value, int | float) or math.isnan(value) or value > ROUNDING:
            raise self._wrong(f"{value!r} as a log-probability")
        return min(max(float(value), NO_PROBABILITY), 0.0)

    def _wrong(self, what: str) -> ShotlessError:
        own = "" if self.settings.tokenizer is None else f" Is {self.settings.tokenizer} its tokenizer?"
        return ShotlessError(f"{self.where}: the server answered with {what}.{own} What was answered before is kept.")


class Vllm(Server):
    """vLLM: `logprob_token_ids` gives any tokens, at most 128 a request, and takes the place of the most probable ones."""

    kind, owner = "vllm", "vllm"
    way = "gives the log-probability of any token (logprob_token_ids), so that every label's is exact"
    AT_ONCE: ClassVar[int] = 128

    def exactly(self, prompt: Prompt, behind: Label, wanted: list[Token]) -> dict[Token, float]:
        """See `Server`."""
        if prompt.request is not None:
            return super().exactly(prompt, behind, wanted)
        found: dict[Token, float] = {}
        for start in range(0, len(wanted), self.AT_ONCE):
            part = wanted[start : start + self.AT_ONCE]
            reply = self._asked("/completions", self._body(prompt, behind) | {"logprob_token_ids": part})
            given = self._said(_choice(reply), prompt, behind, _usage(reply)).logprobs
            if lacking := [token for token in part if token not in given]:
                raise NotOfferedError(f"{self.where}: no log-probabilities of the tokens {choices(lacking)}")
            found |= {token: given[token] for token in part}
        return found

    def _body(self, prompt: Prompt, behind: Label) -> dict[str, Any]:
        return super()._body(prompt, behind) | ({"return_tokens_as_token_ids": True} if prompt.request is None else {})


class Sglang(Server):
    """SGLang: its own `/generate` gives the most probable tokens and any others in one request; `/v1/score` gives the latter alone."""

    kind, owner = "sglang", "sglang"
    way = "gives the log-probability of any token (token_ids_logprob), so that every label's is exact"

    def next_token(self, prompt: Prompt, behind: Label, wanted: Iterable[Token] = ()) -> Said:
        """See `Server`."""
        if self.is_chat(prompt):
            return super().next_token(prompt, behind)
        wanted = list(wanted) if prompt.request is None and self.found.get("exact") else []
        said, named = self._generate(prompt, behind, wanted)
        return Said(said.logprobs | named, said.floor, said.prompt_tokens)

    def exactly(self, prompt: Prompt, behind: Label, wanted: list[Token]) -> dict[Token, float]:
        """See `Server`."""
        return self._generate(prompt, behind, wanted)[1] if prompt.request is None else {}

    def _generate(self, prompt: Prompt, behind: Label, wanted: list[Token]) -> tuple[Said, dict[Token, float]]:
        is_text = prompt.request is not None
        body = {
            "text" if is_text else "input_ids": _behind(prompt, behind),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "top_logprobs_num": self.top,
            "return_text_in_logprobs": is_text,
            **({"token_ids_logprob": wanted} if wanted else {}),
        }
        about = self._asked("/generate", body, self.root).get("meta_info") or {}
        top, named = ((about.get(key) or [[]])[0] or [] for key in ("output_top_logprobs", "output_token_ids_logprobs"))
        tokens = {entry[2 if is_text else 1]: entry[0] for entry in top}
        said = self._listed(tokens, prompt, behind, int(about.get("prompt_tokens") or 0))
        return said, {entry[1]: self._checked(entry[0]) for entry in named}


class LlamaCpp(Server):
    """llama.cpp's own `/completion`: the most probable tokens as the model has them, and any other one if a bias makes it be drawn."""

    kind, owner = "llama_cpp", "llamacpp"
    way = "gives the log-probability of any token that it is made to draw, so that every label's is exact"
    SURE: ClassVar[float] = 1e4  # a bias that no logit outweighs; what is reported is from before it

    def _top(self, prompt: Prompt, behind: Label) -> Said:
        if self.is_chat(prompt):
            return super()._top(prompt, behind)
        reply, position = self._completion(prompt, behind, {"n_probs": self.top})
        listed = {self._named(prompt, entry): entry.get("logprob") for entry in position.get("top_logprobs") or ()}
        return self._listed(listed, prompt, behind, int(reply.get("tokens_evaluated") or 0))

    def exactly(self, prompt: Prompt, behind: Label, wanted: list[Token]) -> dict[Token, float]:
        """See `Server`."""
        found: dict[Token, float] = {}
        for token in wanted if prompt.request is None else ():
            _, position = self._completion(prompt, behind, {"n_probs": 1, "logit_bias": [[token, self.SURE]]})
            if self._named(prompt, position) != token:
                raise NotOfferedError(f"{self.where}: token {position.get('id')!r} was drawn in place of {token}")
            found[token] = self._checked(position.get("logprob"))
        return found

    def _completion(self, prompt: Prompt, behind: Label, more: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        body = {"prompt": _behind(prompt, behind), "n_predict": 1, "temperature": 0.0, "post_sampling_probs": False, "cache_prompt": True}
        reply = self._asked("/completion", {**body, **more}, self.root)
        return reply, (reply.get("completion_probabilities") or [{}])[0]

    @staticmethod
    def _named(prompt: Prompt, entry: dict[str, Any]) -> Token:
        return entry.get("id", -1) if prompt.request is None else _text_of(entry)


KINDS: dict[str, type[Server]] = {kind.kind: kind for kind in (Server, Vllm, Sglang, LlamaCpp)}


def _behind(prompt: Prompt, behind: Label) -> Any:
    """A prompt with the beginning of an answer: token ids or text."""
    return [*prompt.ids, *behind] if prompt.request is None else f"{prompt.request}{behind}"


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    return (reply.get("choices") or [{}])[0]


def _usage(reply: dict[str, Any]) -> int:
    """Tokens of the prompt, as the server counted them."""
    counted = (reply.get("usage") or reply.get("meta_info") or {}).get("prompt_tokens")
    return int(counted or reply.get("tokens_evaluated") or 0)


def _text_of(entry: dict[str, Any]) -> str:
    return bytes(entry["bytes"]).decode("utf-8", "replace") if entry.get("bytes") else str(entry.get("token", ""))


def score_labels(server: Server, prompt: Prompt, labels: Sequence[Label], goes_on: bool = True) -> tuple[list[float], list[float], Said]:
    """Log-probabilities of whole labels [L], bounds of those that are not known [L] (NaN: known), and what was said of the first token.

    The most probable beginnings are asked behind first, if `goes_on`: a chat's answer cannot be begun.
    """
    logprobs, bounds = [math.nan] * len(labels), [math.nan] * len(labels)
    # minus the log-probability of a beginning, the beginning, the labels that have it
    nodes: list[tuple[float, Label, list[int]]] = [(0.0, labels[0][:0], list(range(len(labels))))]
    first: Said | None = None
    best = -math.inf
    while nodes:
        negative, path, own = heapq.heappop(nodes)
        if first is not None and (not goes_on or -negative < best - NEGLIGIBLE_NATS):
            for number in own:
                logprobs[number], bounds[number] = -negative - math.log(len(own)), -negative
            continue
        said = server.next_token(prompt, path, dict.fromkeys(_wanted(labels[number], len(path)) for number in own))
        first = first or said
        known: dict[Token, list[int]] = {}
        censored = []
        for number in own:
            token = _begins(labels[number][len(path) :], said)
            censored.append(number) if token is None else known.setdefault(token, []).append(number)
        for number in censored:
            bounds[number] = -negative + min(said.floor, said.log_missing)
            logprobs[number] = min(bounds[number], -negative + said.log_missing - math.log(len(censored)))
        for token, members in known.items():
            value, reached = -negative + said.logprobs[token], path + (token if isinstance(token, str) else (token,))  # type: ignore[operator]
            going = [number for number in members if labels[number] != reached]
            for number in set(members).difference(going):
                best, logprobs[number] = max(best, value), value
            if going:
                heapq.heappush(nodes, (-value, reached, going))
    assert first is not None
    return logprobs, bounds, first


def _wanted(label: Label, done: int) -> Token:
    return label[done:] if isinstance(label, str) else label[done]


def _begins(rest: Label, said: Said) -> Token | None:
    """The token that the rest of a label begins with, the longest one if tokens are text; None if nothing is said of it."""
    if not isinstance(rest, str):
        return rest[0] if rest[0] in said.logprobs else None
    return max((token for token in said.logprobs if isinstance(token, str) and token and rest.startswith(token)), key=len, default=None)


def open_server(folder: Path) -> Server:
    """The server that the stage `server` wrote `folder` of."""
    about = server_of(folder)
    assert about is not None
    settings = ServerParams.model_validate(about["settings"])
    tokenizer = None if settings.tokenizer is None else load_tokenizer(folder.parent.parent / settings.tokenizer)
    return KINDS[about["found"]["kind"]](folder.name, settings, about["found"], tokenizer)


def ask_server(name: str, settings: ServerParams, folders: Folders) -> None:
    """Write artifacts/servers/NAME/server.json: its settings (not its key), and what was found by asking it a few prompts.

    Raises UsageError if it has another model, or gives no log-probabilities.
    """
    own = None if settings.tokenizer is None else folders.artifacts / settings.tokenizer
    tokenizer = None if own is None else load_tokenizer(own)
    with closing(Server(name, settings, {})) as any_kind:
        try:
            listed = {str(entry["id"]): entry for entry in any_kind.call(f"{settings.url.rstrip('/')}/models")["data"]}
        except NotOfferedError:
            listed = {}
    if listed and settings.model not in listed:
        raise UsageError(f"servers.{name}.model: the server has no {settings.model!r}; it has: {choices(listed)}")
    about = listed.get(settings.model, {})
    kind = next((kind for kind in KINDS.values() if kind.owner == about.get("owned_by")), Server)
    kind = kind if settings.kind == "auto" else KINDS[settings.kind]
    with closing(kind(name, settings, {}, tokenizer)) as server:
        found = _found(server, about)
    found["tokenizer_sha256"] = None if own is None else tokenizer_sha256(own)
    kept = folders.work / "servers" / f"{name}.json"  # the first answers that this model gave: later ones are compared with them
    earlier = read_json(kept) if kept.is_file() else {}
    if {**earlier, "probe": None} == {**found, "probe": None} and not has_moved(earlier["probe"], found["probe"]):
        found = earlier
    write_json(found, kept)
    print(f"servers.{name}: {found['kind']}, model {found['reports'] or settings.model!r}: {found['way']}", flush=True)
    write_json({"settings": settings.model_dump(mode="json"), "found": found}, folders.artifacts / "servers" / name / SERVER)


def _found(server: Server, about: dict[str, Any]) -> dict[str, Any]:
    """What a server is and can; `about` is its own entry of the model."""
    limit, tokenizer = about.get("max_model_len"), server.tokenizer
    if server.kind == "llama_cpp":
        limit = server.call(f"{server.root}/props")["default_generation_settings"]["n_ctx"]
    found: dict[str, Any] = {"kind": server.kind, "chat_alone": False, "exact": False, "top": TOP}
    prompt = probe_prompts(tokenizer)[0]
    try:
        said = server.next_token(prompt, () if tokenizer is not None else "")
    except NotOfferedError as error:
        if tokenizer is not None:
            raise UsageError(
                f"{error}\n{server.where}: no log-probabilities behind token ids. Leave `tokenizer` out to send text."
            ) from None
        found["chat_alone"] = True
        server.found = dict(found)
        try:
            said = server.next_token(prompt, "")
        except NotOfferedError as second:
            raise UsageError(
                f"{error}\n{second}\n{server.where}: no log-probabilities, without which its answers are no distributions. Start vLLM, "
                "SGLang or llama-server with this model, or take a model of the service that gives `logprobs`."
            ) from None
    if not found["chat_alone"]:
        found["exact"] = _is_exact(server, prompt, said)
    server.found = dict(found)
    for count in MORE if not found["exact"] else ():
        server.found = {**found, "top": count}
        try:
            more = server.next_token(prompt, () if tokenizer is not None else "")
        except ShotlessError:
            continue
        if len(more.logprobs) > len(said.logprobs):
            said, found["top"] = more, count
            break
    server.found = dict(found)
    way = server.way
    if not found["exact"]:
        way = f"lists the {len(said.logprobs)} most probable tokens, and of labels outside a bound alone is known"
    if found["chat_alone"]:
        way += "; it takes chat messages alone, so that a prompt is one message and an answer cannot be begun"
    return found | {"reports": server.reports, "context_tokens": limit, "way": way, "probe": probe_answers(server)}


def probe_prompts(tokenizer: Any) -> list[Prompt]:
    """The fixed prompts by whose answers a model is known again."""
    if tokenizer is None:
        return [Prompt((), request=text) for text in PROBES]
    return [Prompt(tuple(tokenizer(text, split_special_tokens=True).input_ids)) for text in PROBES]


def probe_answers(server: Server) -> list[list[list[Any]]]:
    """For each probe prompt its most probable tokens, as [token, nats], most probable first."""
    answers = []
    for prompt in probe_prompts(server.tokenizer):
        logprobs = server.next_token(prompt, () if prompt.request is None else "").logprobs
        top = sorted(logprobs.items(), key=lambda item: (-item[1], str(item[0])))[:PROBE_TOP]
        answers.append([[token, round(value, 4)] for token, value in top])
    return answers


def has_moved(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether the most probable tokens of any probe are others, or a probability is farther off than batches explain."""
    for old, new in zip(before, now, strict=True):
        for one, other in ((dict(old), dict(new)), (dict(new), dict(old))):
            least = min(other.values())
            if any(abs(value - other.get(token, least)) > DRIFT_NATS for token, value in one.items() if value > least - DRIFT_NATS):
                return True
    return False


def _is_exact(server: Server, prompt: Prompt, said: Said) -> bool:
    """Whether a server gives any token's log-probability that it is asked for: the first one's as it was listed, and an unlisted one's."""
    top = max(said.logprobs, key=said.logprobs.__getitem__)
    some = UNLISTED if server.tokenizer is None else range(len(server.tokenizer))
    unlisted = next(token for token in some if token not in said.logprobs)
    try:
        given = server.exactly(prompt, () if prompt.request is None else "", [top, unlisted])
    except ShotlessError:
        return False
    return abs(given.get(top, math.inf) - said.logprobs[top]) < DRIFT_NATS and given.get(unlisted, math.inf) <= said.floor + DRIFT_NATS


@dataclass(frozen=True)
class _Row:
    prompt: Prompt
    logprobs: list[float]
    bounds: list[float]
    said: Said


class ServerBackend:
    """A server in a backend's place: many requests at a time; rows are given out every `WRITE_SECONDS`, as they come."""

    def __init__(self, folder: Path, tokens: TaskTokens, cache: CacheParams) -> None:
        self._server, self._cache = open_server(folder), cache
        self._labels: list[Label] = [tuple(ids) for ids in tokens.completions]
        self._labels = self._labels or list(tokens.task.verbalisers)
        self._request_seconds = 0.0

    @property
    def note(self) -> str:
        """What was asked and spent so far, for the progress line."""
        server, spent = self._server, ""
        if server.settings.price is not None:
            spent = f", {server.spent:,.2f} spent"
        return f", {server.requests:,} requests, {sum(server.tokens):,} tokens{spent}"

    @property
    def most_requests(self) -> int:
        """Requests that a row may take: one for each beginning of a label that goes on, and one more for each token that is not listed."""
        if self._server.found["chat_alone"]:
            return 1
        beginnings = {label[:end] for label in self._labels for end in range(len(label))}
        apart = {"sglang": 0, "vllm": 1}.get(self._server.kind, len(self._labels)) if self._server.found["exact"] else 0
        return len(beginnings) * (1 + apart)

    def open(self, probe: Sequence[Prompt]) -> dict[str, Any]:  # noqa: ARG002
        """Ask the probe again, once. Raises MismatchError if it is no longer answered as the stage `server` met it."""
        server, report = self._server, {"name": "server", "reason": self._server.found["way"], "token_budget": 1, "device": "server"}
        if self._request_seconds:  # it was asked
            return report
        began = time.monotonic()
        before, now = server.found["probe"], probe_answers(server)
        self._request_seconds = (time.monotonic() - began) / len(PROBES)
        if has_moved(before, now):
            raise MismatchError(
                f"{server.where}: the server answers otherwise than when it was met, so its model is another teacher.\n"
                f"then: {before}\nnow:  {now}\nStart the model of then, or ask all of this one: "
                f"`dvc repro --force server@{server.where.partition('.')[2]}`."
            )
        return report

    def announce(self, lengths: Sequence[int]) -> None:
        """Say what rows with prompts of so many tokens will take. Raises UsageError if that is more than `budget`."""
        server, rows = self._server, len(lengths)
        least = server.cost(sum(lengths), rows)
        money = "" if server.settings.price is None else f", {least:,.2f} or more"
        minutes = rows * self._request_seconds / server.settings.concurrency / 60
        print(
            f"{server.where}: {rows:,} to {rows * self.most_requests:,} requests, {sum(lengths):,} prompt tokens or more{money}, "
            f"about {minutes:,.1f} minutes or more",
            flush=True,
        )
        if server.settings.budget is not None and least > server.settings.budget:
            raise UsageError(
                f"{server.where}.budget: {server.settings.budget:g}, and {rows:,} rows cost {least:,.2f} or more. Raise it, or ask for "
                "less: data.transfer.limit, contexts.*.count, shorter contexts."
            )

    def score(self, jobs: Iterable[Job]) -> Iterator[tuple[pa.Table, float]]:
        """Rows (`schema.STORED`) as they come, some at a time, and the seconds that they took. An error waits for what is under way."""
        server, ahead = self._server, 2 * self._server.settings.concurrency
        failure: BaseException | None = None
        prompts = (prompt for job in jobs for prompt in job.prompts)
        waiting: dict[Future[_Row], float] = {}  # → what it may cost
        done: list[_Row] = []
        began = time.monotonic()
        with ThreadPoolExecutor(server.settings.concurrency) as pool:
            while True:
                while failure is None and len(waiting) < ahead and (prompt := next(prompts, None)) is not None:
                    most = server.cost(self.most_requests * prompt.length, self.most_requests)
                    budget = server.settings.budget
                    if budget is not None and server.spent + sum(waiting.values()) + most > budget:
                        failure = ShotlessError(
                            f"{server.where}.budget: {budget:g}, and {server.spent:,.2f} are spent: the next request could pass it. What "
                            "was answered is kept; run again to go on, with a budget of its own."
                        )
                        break
                    waiting[pool.submit(self._row, prompt)] = most
                try:
                    finished, _ = wait(waiting, WRITE_SECONDS, FIRST_COMPLETED)
                except KeyboardInterrupt as error:
                    failure, finished = error, set()
                for future in finished:
                    waiting.pop(future)
                    try:
                        done.append(future.result())
                    except ShotlessError as error:
                        failure = failure or error
                now = time.monotonic()
                if done and (now - began > WRITE_SECONDS or len(done) >= WRITE_ROWS or not waiting):
                    yield self._table(done), now - began
                    done, began = [], time.monotonic()
                if not waiting:
                    break
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def _row(self, prompt: Prompt) -> _Row:
        chat = self._server.is_chat(prompt)
        labels = [text.strip() if isinstance(text, str) else text for text in self._labels] if chat else self._labels
        return _Row(prompt, *score_labels(self._server, prompt, labels, goes_on=not chat))

    def _table(self, rows: Sequence[_Row]) -> pa.Table:
        bounds = torch.tensor([row.bounds for row in rows])
        scores = Scores(
            label_logprobs=torch.tensor([row.logprobs for row in rows]),
            positions=torch.ones(len(rows), dtype=torch.long),
            completion_logprobs=torch.zeros(0),
            encoded=self._encoded([row.said for row in rows]),
            label_bounds=None if bounds.isnan().all() else bounds,
        )
        prompts = [row.prompt for row in rows]
        table = stored_rows(prompts, prompts, scores)
        counted = [row.said.prompt_tokens or row.prompt.length for row in rows]
        field = STORED.field("prompt_tokens")
        return table.set_column(STORED.get_field_index(field.name), field, pa.array(counted, field.type))

    def _encoded(self, said: Sequence[Said]) -> Encoded:
        """The most probable tokens and the mass of the others; of text nothing, since students need ids."""
        tokenizer = self._server.tokenizer
        count = 0 if tokenizer is None else min(self._cache.top_k, TOP)
        ids, logprobs = torch.zeros(len(said), count, dtype=torch.int32), torch.full((len(said), count), -math.inf)
        for number, one in enumerate(said):
            listed = {token: value for token, value in one.logprobs.items() if isinstance(token, int) and value >= one.floor}
            known = sorted((-value, token) for token, value in listed.items())[:count]
            ids[number, : len(known)] = torch.tensor([token for _, token in known], dtype=torch.int32)
            logprobs[number, : len(known)] = torch.tensor([-value for value, _ in known])
        tail = (1 - logprobs.double().exp().sum(-1)).clamp_min(0.0).float()
        width = 0 if tokenizer is None else 1
        others = max(1, 0 if tokenizer is None else len(tokenizer) - count)  # over which the tail is taken to be spread evenly
        entropy = torch.special.entr(logprobs.exp()).sum(-1) + torch.special.entr(tail) + tail * math.log(others)
        none, drawn = torch.zeros(len(said), 0), torch.zeros(len(said), 0, dtype=torch.int32)
        return {
            "topk_ids": ids,
            "topk_logprobs": rounded(logprobs, self._cache),
            "sampled_ids": drawn,
            "sampled_logprobs": none,
            "sampled_counts": drawn,
            "full_logprobs": none,
            "log_z": torch.zeros(len(said)),
            "tail_mass": tail,
            "log_norms": none,
            "entropies": entropy.unsqueeze(-1)[:, :width],
            "hidden_states": none.half(),
        }


def server_fidelity(rows: pa.Table, chosen: pa.Table, again: pa.Table) -> dict[str, float]:
    """What is known of a server's answers: `rows` are all (`schema.STORED`); `chosen` are some of them, which were asked `again`.

    Mass of the tokens that are kept; the share of labels of which only a bound is known, their estimated mass and the most that it can be;
    how far label probabilities moved between two answers, in probability, and how often the most probable label changed.
    """
    logprobs = np.array(rows["label_logprobs"].to_pylist())
    bounds = np.array([own or [math.nan] * logprobs.shape[1] for own in rows["label_bounds"].to_pylist()])
    censored = ~np.isnan(bounds)
    before, now = (np.exp(np.array(table["label_logprobs"].to_pylist())) for table in (chosen, again))
    return {
        "retained_mass": 1 - float(np.mean([tail for own in rows["tail_mass"].to_pylist() for tail in own])),
        "censored_labels": float(censored.mean()),
        "censored_rows": float(censored.any(-1).mean()),
        "censored_mass": float(np.where(censored, np.exp(logprobs), 0).sum(-1).mean()),
        "censored_mass_most": float(np.minimum(1, np.where(censored, np.exp(bounds), 0).sum(-1)).mean()),
        "moved_mean": float(np.abs(before - now).mean()),
        "moved_most": float(np.abs(before - now).max()),
        "changed_answers": float((before.argmax(-1) != now.argmax(-1)).mean()),
    }
