"""Teachers behind servers: vLLM, SGLang, llama.cpp's, and others that speak OpenAI's protocol and give log-probabilities.

Each kind of server answers one question, `write`: a text behind a prompt, with the most probable tokens at each of its tokens. A label's
score is asked token by token behind what it begins with, which a server's prefix cache serves; labels that cannot matter any more are not
asked further. A server that lists only its most probable tokens leaves labels *censored*: known to be no more probable than a bound
(`schema.STORED`). Free text is one request; a token that the server cuts off, since it ends the answer, is asked for behind it. Tokens
become ids by their text. An answer that has another token is *hard*: its text is put into ids, and each has all the probability.

Of real servers only llama-cpp-python's, of OpenAI's protocol, was run (docs/teachers.md). vLLM, SGLang and llama.cpp's `llama-server` were
built to their documented fields. The key is in the headers of requests alone.
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
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import numpy as np
import pyarrow as pa
import torch
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from pipeline.cache.encodings import Encoded, rounded
from pipeline.cache.fidelity import censored
from pipeline.errors import MismatchError, ShotlessError, UsageError, choices
from pipeline.files import Folders, read_json, write_json
from pipeline.models.folders import SERVER, load_tokenizer, server_of, tokenizer_sha256
from pipeline.params import CacheParams, CompletionParams, ServerParams
from pipeline.params.methods import SERVER_TOP as TOP
from pipeline.schema import STORED, Prompt
from pipeline.task import TaskTokens
from pipeline.teachers.engines import Scores
from pipeline.teachers.generation import has_ended
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


Position = tuple[Any, Any, dict[Any, Any]]
"""A token of an answer as a server gives it: itself, its log-probability, and those of the most probable ones."""


@dataclass(frozen=True)
class Written:
    """An answer in a server's tokens, what it said at each, and whether it ended it, else it was cut."""

    text: str
    tokens: list[Token]
    logprobs: list[float]
    said: list[Said]
    is_whole: bool


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
    """Limits the requests that are under way: a failed one halves the limit, and as many answers as the limit raise it by one."""

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
        self.sends_ids = tokenizer is not None and settings.sends == "ids"
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
        """What these tokens cost; 0 without a price."""
        price = self.settings.price
        return 0.0 if price is None else (prompt_tokens * price.input + answer_tokens * price.output) / 1e6

    @cached_property
    def ids(self) -> dict[str, int]:
        """Text → token id, of tokens whose text no other token has; what servers show as nothing ends a text."""
        texts = self.tokenizer.batch_decode([[number] for number in range(len(self.tokenizer))])
        found: dict[str, int] = {}
        for number, text in enumerate(texts):
            found[text] = -1 if text in found else number
        return {text: number for text, number in found.items() if number >= 0} | {"": self.tokenizer.eos_token_id}

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
        written = self.write(prompt, behind)
        if not written.said:
            raise self._without()
        said = written.said[0]
        if self.found.get("exact") and (missing := [token for token in wanted if token not in said.logprobs]):
            said = Said(said.logprobs | self.exactly(prompt, behind, missing), said.floor, said.prompt_tokens)
        return said

    def write(self, prompt: Prompt, behind: Label, sampling: dict[str, Any] | None = None) -> Written:
        """What follows a prompt and the beginning of an answer: one token, or as `sampling` says (max_tokens, temperature, stop, seed).

        It ends with the token that ends it, or without, if the server cuts that off.
        """
        if self.is_chat(prompt):
            turns = prompt.request if isinstance(prompt.request, tuple) else [("user", prompt.request)]
            messages = [{"role": role, "content": content} for role, content in turns or ()]
            path, body = "/chat/completions", {"messages": messages, "logprobs": True, "top_logprobs": self.top}
        else:
            path, body = "/completions", self._body(prompt, behind)
        reply = self._asked(path, body | (sampling or {}))
        choice = _choice(reply)
        text, about = choice.get("text") or (choice.get("message") or {}).get("content") or "", choice.get("logprobs") or {}
        if about.get("content"):
            positions = [
                (_text_of(own), own.get("logprob"), {_text_of(entry): entry.get("logprob") for entry in own.get("top_logprobs") or ()})
                for own in about["content"]
            ]
        else:
            listed = about.get("top_logprobs") or []
            own = zip(about.get("tokens") or [], about.get("token_logprobs") or [], listed, strict=False)
            positions = [(token, value, top or {}) for token, value, top in own]
        return self._written((prompt, behind), reply, text, positions, choice.get("finish_reason") != "length")

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
            self.tokens = [self.tokens[0] + _usage(reply), self.tokens[1] + _usage(reply, "completion_tokens", "tokens_predicted")]
        return reply

    def _written(
        self, asked: tuple[Prompt, Label], reply: dict[str, Any], text: str, positions: Sequence[Position], whole: bool
    ) -> Written:
        """An answer, checked."""
        if text and not positions:
            raise self._without()
        counted = _usage(reply)
        said = [self._listed({self._token(token): value for token, value in listed.items()}, *asked, counted) for *_, listed in positions]
        logprobs = [self._checked(value) for _, value, _ in positions]
        return Written(text, [self._token(token) for token, *_ in positions], logprobs, said, whole)

    def _listed(self, given: dict[Token, Any], prompt: Prompt, behind: Label, counted: int) -> Said:
        """What a server listed, checked. Raises NotOfferedError if that is nothing, ShotlessError if it cannot be."""
        if not given:
            raise self._without()
        if prompt.request is None and counted and counted != (own := len(prompt.ids) + len(behind)):
            raise self._wrong(f"{counted} tokens for a prompt of {own} token ids")
        logprobs = {token: self._checked(value) for token, value in given.items()}
        if (mass := math.fsum(map(math.exp, logprobs.values()))) > 1 + 1e-2:
            raise self._wrong(f"probabilities that sum to {mass:.3f}")
        return Said(logprobs, min(logprobs.values()), counted)

    def _without(self) -> NotOfferedError:
        return NotOfferedError(f"{self.where}: an answer without log-probabilities")

    def _token(self, given: Token) -> Token:
        """The id of a token by its text, if prompts are ids and one token alone has this text."""
        if isinstance(given, str) and given.startswith("token_id:"):
            return int(given.removeprefix("token_id:"))
        return self.ids.get(given, given) if isinstance(given, str) and self.sends_ids else given

    def id_of(self, token: Token) -> int | None:
        """The id of a token in the tokenizer that students share; None if none has its text, or several have."""
        return token if isinstance(token, int) else self.ids.get(token)

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
    PLAIN: ClassVar[dict[str, Any]] = {"repetition_penalty": 1.0, "top_k": 0, "min_p": 0.0, "include_stop_str_in_output": True}

    def exactly(self, prompt: Prompt, behind: Label, wanted: list[Token]) -> dict[Token, float]:
        """See `Server`."""
        if prompt.request is not None:
            return super().exactly(prompt, behind, wanted)
        found: dict[Token, float] = {}
        for start in range(0, len(wanted), self.AT_ONCE):
            part = wanted[start : start + self.AT_ONCE]
            reply = self._asked("/completions", self._body(prompt, behind) | {"logprob_token_ids": part})
            listed = (_choice(reply).get("logprobs") or {}).get("top_logprobs") or [{}]
            given = self._listed({self._token(text): value for text, value in listed[0].items()}, prompt, behind, _usage(reply)).logprobs
            if lacking := [token for token in part if token not in given]:
                raise NotOfferedError(f"{self.where}: no log-probabilities of the tokens {choices(lacking)}")
            found |= {token: given[token] for token in part}
        return found

    def _body(self, prompt: Prompt, behind: Label) -> dict[str, Any]:
        return super()._body(prompt, behind) | self.PLAIN | {"return_tokens_as_token_ids": prompt.request is None}


class Sglang(Server):
    """SGLang: its own `/generate` gives the most probable tokens and any others in one request; `/v1/score` gives the latter alone."""

    kind, owner = "sglang", "sglang"
    way = "gives the log-probability of any token (token_ids_logprob), so that every label's is exact"

    def next_token(self, prompt: Prompt, behind: Label, wanted: Iterable[Token] = ()) -> Said:
        """See `Server`."""
        wanted = list(wanted) if prompt.request is None and self.found.get("exact") else []
        if not wanted:
            return super().next_token(prompt, behind)
        written, named = self._generate(prompt, behind, wanted)
        said = written.said[0]
        return Said(said.logprobs | named, said.floor, said.prompt_tokens)

    def write(self, prompt: Prompt, behind: Label, sampling: dict[str, Any] | None = None) -> Written:
        """See `Server`. Raises UsageError for a temperature: it would be in the log-probabilities."""
        if self.is_chat(prompt):
            return super().write(prompt, behind, sampling)
        if sampling and sampling["temperature"] not in {0, 1}:
            raise UsageError(
                f"{self.where}: task.completion.temperature: {sampling['temperature']:g}, and SGLang's log-probabilities are of what it "
                "tempered. Use 0 or 1."
            )
        return self._generate(prompt, behind, [], sampling)[0]

    def exactly(self, prompt: Prompt, behind: Label, wanted: list[Token]) -> dict[Token, float]:
        """See `Server`."""
        return self._generate(prompt, behind, wanted)[1] if prompt.request is None else {}

    def _generate(
        self, prompt: Prompt, behind: Label, wanted: list[Token], sampling: dict[str, Any] | None = None
    ) -> tuple[Written, dict[Token, float]]:
        is_text, sampling = prompt.request is not None, sampling or {"max_tokens": 1, "temperature": 1.0, "stop": []}
        body = {
            "text" if is_text else "input_ids": _behind(prompt, behind),
            "sampling_params": {
                "max_new_tokens": sampling["max_tokens"],
                "temperature": sampling["temperature"],
                "stop": sampling["stop"],
                "no_stop_trim": True,
            },
            "return_logprob": True,
            "top_logprobs_num": self.top,
            "return_text_in_logprobs": is_text,
            **({"token_ids_logprob": wanted} if wanted else {}),
        }
        reply = self._asked("/generate", body, self.root)
        about, at = reply.get("meta_info") or {}, 2 if is_text else 1
        pairs = zip(about.get("output_token_logprobs") or [], about.get("output_top_logprobs") or [], strict=False)
        positions = [(own[at], own[0], {entry[at]: entry[0] for entry in top or ()}) for own, top in pairs]
        whole = (about.get("finish_reason") or {}).get("type") != "length"
        named = (about.get("output_token_ids_logprobs") or [[]])[0] or []
        written = self._written((prompt, behind), reply, str(reply.get("text") or ""), positions, whole)
        return written, {entry[1]: self._checked(entry[0]) for entry in named}


class LlamaCpp(Server):
    """llama.cpp's own `/completion`: the most probable tokens as the model has them, and any other one if a bias makes it be drawn."""

    kind, owner = "llama_cpp", "llamacpp"
    way = "gives the log-probability of any token that it is made to draw, so that every label's is exact"
    SURE: ClassVar[float] = 1e4  # a bias that no logit outweighs; what is reported is from before it
    PLAIN: ClassVar[dict[str, float]] = {
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
    }  # nothing is taken from what is drawn

    def write(self, prompt: Prompt, behind: Label, sampling: dict[str, Any] | None = None) -> Written:
        """See `Server`."""
        if self.is_chat(prompt):
            return super().write(prompt, behind, sampling)
        reply = self._completion(prompt, behind, {"n_probs": self.top, **self.PLAIN, **(sampling or {})})
        positions = [
            (
                self._named(prompt, own),
                own.get("logprob"),
                {self._named(prompt, entry): entry.get("logprob") for entry in own["top_logprobs"]},
            )
            for own in reply.get("completion_probabilities") or ()
        ]
        return self._written((prompt, behind), reply, str(reply.get("content") or ""), positions, reply.get("stop_type") != "limit")

    def exactly(self, prompt: Prompt, behind: Label, wanted: list[Token]) -> dict[Token, float]:
        """See `Server`."""
        found: dict[Token, float] = {}
        for token in wanted if prompt.request is None else ():
            position = (
                self._completion(prompt, behind, {"n_probs": 1, "logit_bias": [[token, self.SURE]]})["completion_probabilities"] or [{}]
            )[0]
            if self._named(prompt, position) != token:
                raise NotOfferedError(f"{self.where}: token {position.get('id')!r} was drawn in place of {token}")
            found[token] = self._checked(position.get("logprob"))
        return found

    def _completion(self, prompt: Prompt, behind: Label, more: dict[str, Any]) -> dict[str, Any]:
        body = {"prompt": _behind(prompt, behind), "n_predict": more.pop("max_tokens", 1), "temperature": 0.0}
        return self._asked("/completion", {**body, "post_sampling_probs": False, "cache_prompt": True, **more}, self.root)

    @staticmethod
    def _named(prompt: Prompt, entry: dict[str, Any]) -> Token:
        return entry.get("id", -1) if prompt.request is None else _text_of(entry)


KINDS: dict[str, type[Server]] = {kind.kind: kind for kind in (Server, Vllm, Sglang, LlamaCpp)}


def _behind(prompt: Prompt, behind: Label) -> Any:
    """A prompt with the beginning of an answer: token ids or text."""
    return [*prompt.ids, *behind] if prompt.request is None else f"{prompt.request}{behind}"


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    return (reply.get("choices") or [{}])[0]


def _usage(reply: dict[str, Any], name: str = "prompt_tokens", other: str = "tokens_evaluated") -> int:
    """Tokens of the prompt, or of the answer, as the server counted them."""
    counted = (reply.get("usage") or reply.get("meta_info") or {}).get(name)
    return int(counted or reply.get(other) or 0)


def _text_of(entry: dict[str, Any]) -> str:
    return bytes(entry["bytes"]).decode("utf-8", "replace") if entry.get("bytes") else str(entry.get("token", ""))


def score_labels(server: Server, prompt: Prompt, labels: Sequence[Label], goes_on: bool = True) -> tuple[list[float], list[float], Said]:
    """Log-probabilities of whole labels [L], bounds of those that are not known [L] (NaN: known), and what was said of the first token.

    The most probable beginnings are asked behind first, if `goes_on`: a chat's answer cannot be begun. A label that is sent as text may
    also be written in tokens that are not listed: if these could have more probability than what is known, it is censored.
    """
    logprobs, bounds = [math.nan] * len(labels), [math.nan] * len(labels)
    unlisted: dict[int, tuple[float, float]] = {}  # label → log-probability by tokens that are not listed: the most, an estimate
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
        absent = []
        for number in own:
            token = _begins(labels[number][len(path) :], said)
            absent.append(number) if token is None else known.setdefault(token, []).append(number)
        most = -negative + min(said.floor, said.log_missing)
        for number in absent:
            bounds[number] = most
            logprobs[number] = min(most, -negative + said.log_missing - math.log(len(absent)))
        for token, members in known.items():
            value, reached = -negative + said.logprobs[token], path + (token if isinstance(token, str) else (token,))  # type: ignore[operator]
            going = [number for number in members if labels[number] != reached]
            for number in set(members).difference(going):
                best, logprobs[number] = max(best, value), value
            if going:
                heapq.heappush(nodes, (-value, reached, going))
            for number in going if isinstance(reached, str) else ():
                other = most, min(most, -negative + said.log_missing - math.log(len(own)))
                unlisted[number] = max(unlisted.get(number, other), other)
    for number, (most, estimate) in unlisted.items():
        if most > logprobs[number]:
            bounds[number] = np.logaddexp(most, logprobs[number] if math.isnan(bounds[number]) else bounds[number])
            logprobs[number] = max(estimate, logprobs[number])
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
    limit = about.get("max_model_len")
    if server.kind == "llama_cpp":
        limit = server.call(f"{server.root}/props")["default_generation_settings"]["n_ctx"]
    found: dict[str, Any] = {"kind": server.kind, "chat_alone": False, "exact": False, "top": TOP}
    prompt = probe_prompts(server)[0]
    try:
        said = server.next_token(prompt, empty(prompt))
    except NotOfferedError as error:
        if server.sends_ids:
            raise UsageError(f"{error}\n{server.where}: no log-probabilities behind token ids. Set `sends: text`.") from None
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
            more = server.next_token(prompt, empty(prompt))
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


def probe_prompts(server: Server) -> list[Prompt]:
    """The fixed prompts by whose answers a model is known again."""
    if not server.sends_ids:
        return [Prompt((), request=text) for text in PROBES]
    return [Prompt(tuple(server.tokenizer(text, split_special_tokens=True).input_ids)) for text in PROBES]


def empty(prompt: Prompt) -> Label:
    """The beginning of an answer to a prompt, before its first token."""
    return () if prompt.request is None else ""


def probe_answers(server: Server) -> list[list[list[Any]]]:
    """For each probe prompt its most probable tokens, as [token, nats], most probable first."""
    answers = []
    for prompt in probe_prompts(server):
        logprobs = server.next_token(prompt, empty(prompt)).logprobs
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
    some = range(len(server.tokenizer)) if server.sends_ids else UNLISTED
    unlisted = next(token for token in some if token not in said.logprobs)
    try:
        given = server.exactly(prompt, empty(prompt), [top, unlisted])
    except ShotlessError:
        return False
    return abs(given.get(top, math.inf) - said.logprobs[top]) < DRIFT_NATS and given.get(unlisted, math.inf) <= said.floor + DRIFT_NATS


@dataclass(frozen=True)
class _Row:
    prompt: Prompt
    said: list[Said]  # at each position
    logprobs: list[float]  # of the labels, or of the answer's tokens
    bounds: list[float] = field(default_factory=list)
    answer: tuple[int, ...] | None = None


class ServerBackend:
    """A server in a backend's place: many requests at a time; rows are given out every `WRITE_SECONDS`, as they come."""

    def __init__(self, folder: Path, tokens: TaskTokens, cache: CacheParams) -> None:
        self._server, self._cache, self._tokens = open_server(folder), cache, tokens
        self._labels: list[Label] = [tuple(ids) for ids in tokens.completions]
        self._labels = self._labels or list(tokens.task.verbalisers)
        self._completion = tokens.task.params.completion
        self._was_met = False

    @property
    def note(self) -> str:
        """What was asked and spent so far, for the progress line."""
        server, spent = self._server, ""
        if server.settings.price is not None:
            spent = f", {server.spent:,.2f} spent"
        return f", {server.requests:,} requests, {sum(server.tokens):,} tokens{spent}"

    @property
    def most_requests(self) -> int:
        """Requests that a row may take: one for each beginning of a label that goes on, and one more for each token that is not listed;
        of free text one, and one for its end.
        """
        if self._server.found["chat_alone"]:
            return 1
        if self._completion is not None:
            return 1 if self._server.kind in {"sglang", "vllm"} else 2
        beginnings = {label[:end] for label in self._labels for end in range(len(label))}
        apart = {"sglang": 0, "vllm": 1}.get(self._server.kind, len(self._labels)) if self._server.found["exact"] else 0
        return len(beginnings) * (1 + apart)

    def open(self, probe: Sequence[Prompt]) -> dict[str, Any]:  # noqa: ARG002
        """Ask the probe again, once. Raises MismatchError if it is no longer answered as the stage `server` met it."""
        server, report = self._server, {"name": "server", "reason": self._server.found["way"], "token_budget": 1, "device": "server"}
        if self._was_met:
            return report
        before, now = server.found["probe"], probe_answers(server)
        if has_moved(before, now):
            raise MismatchError(
                f"{server.where}: the server answers otherwise than when it was met, so its model is another teacher.\n"
                f"then: {before}\nnow:  {now}\nStart the model of then, or ask all of this one: "
                f"`dvc repro --force server@{server.where.partition('.')[2]}`."
            )
        self._was_met = True
        return report

    def _most(self, tokens: int) -> float:
        """Money that a row with so long a prompt may cost."""
        answer = 0 if self._completion is None else self._completion.max_tokens
        return self._server.cost(self.most_requests * (tokens + answer), max(answer - 1, 0) + self.most_requests)

    def announce(self, lengths: Sequence[int], *, is_said: bool = True) -> None:
        """Say the requests, tokens and money that rows with prompts of these `lengths` need. Raises UsageError if it passes `budget`."""
        server, rows = self._server, len(lengths)
        least = server.cost(sum(lengths), rows)
        money = "" if server.settings.price is None else f", {least:,.2f} to {sum(map(self._most, lengths)):,.2f} in money"
        if is_said:
            print(
                f"{server.where}: {rows:,} to {rows * self.most_requests:,} requests, {sum(lengths):,} prompt tokens or more{money}",
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
                    most, budget = self._most(prompt.length), server.settings.budget
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
        if self._completion is not None:
            return self._free_text(prompt, self._completion)
        chat = self._server.is_chat(prompt)
        labels = [text.strip() if isinstance(text, str) else text for text in self._labels] if chat else self._labels
        logprobs, bounds, said = score_labels(self._server, prompt, labels, goes_on=not chat)
        return _Row(prompt, [said], logprobs, bounds)

    def _free_text(self, prompt: Prompt, completion: CompletionParams) -> _Row:
        """An answer in the tokenizer's ids, up to what ends it, as local generation cuts it; hard if a token has another text."""
        server = self._server
        sampling = {"max_tokens": completion.max_tokens, "temperature": completion.temperature, "top_p": 1.0, "stop": list(completion.stop)}
        written = server.write(prompt, empty(prompt), {**sampling, "seed": completion.seed + int(prompt.prompt_sha[:7], 16)})
        # a chat's answer has no space before it, which a plain student writes
        ids = self._ids(written.tokens) if self._tokens.task.format == "chat" or not server.is_chat(prompt) else None
        if ids is None:
            ids = self._tokens.answer_ids(written.text, written.is_whole)
            certain = [Said({number: 0.0}, 0.0, 0) for number in ids]
            return _Row(prompt, certain, [0.0] * len(ids), answer=tuple(ids))
        tokens, said, logprobs = written.tokens, written.said[: len(ids)], written.logprobs[: len(ids)]
        while not self._has_ended(ids) and len(ids) < completion.max_tokens and (written.is_whole or not ids):
            number, token, following = self._cut_off(prompt, ids, tokens)
            ids, tokens, said, logprobs = [*ids, number], [*tokens, token], [*said, following], [*logprobs, following.logprobs[token]]
        return _Row(prompt, said, logprobs, answer=tuple(ids))

    def _cut_off(self, prompt: Prompt, ids: list[int], tokens: list[Token]) -> tuple[int, Token, Said]:
        """What a server cut off: the most probable token that ends an answer or begins an end, asked for behind what it wrote; if that
        cannot be asked, or none is listed, the end that a demonstration has, for certain.
        """
        server, stops = self._server, self._completion.stop if self._completion is not None else ()
        if not server.is_chat(prompt):
            said = server.next_token(prompt, tuple(ids) if server.sends_ids else "".join(map(str, tokens)))
            for token in sorted(said.logprobs, key=said.logprobs.__getitem__, reverse=True):
                if (number := server.id_of(token)) is not None:
                    text = self._tokens.tokenizer.decode([*ids, number])
                    begun = any(text.endswith(stop[:length]) for stop in stops for length in range(1, len(stop)))
                    if begun or self._has_ended([*ids, number]):
                        return number, token, said
        end = self._tokens.answer_ids("", True)[-1]
        return end, end, Said({end: 0.0}, 0.0, 0)

    def _ids(self, tokens: Sequence[Token]) -> list[int] | None:
        """Ids of tokens up to the one that ends the answer; None if one is no token of the tokenizer."""
        ids: list[int] = []
        for token in tokens:
            if (number := self._server.id_of(token)) is None:
                return None
            ids.append(number)
            if self._has_ended(ids):
                break
        return ids

    def _has_ended(self, ids: Sequence[int]) -> bool:
        assert self._completion is not None
        tokenizer = self._tokens.tokenizer
        return bool(ids) and has_ended(ids, (tokenizer.eos_token_id, *self._tokens.end_ids), self._completion.stop, tokenizer)

    def _table(self, rows: Sequence[_Row]) -> pa.Table:
        is_text = self._completion is not None
        bounds = torch.tensor([row.bounds for row in rows])
        values = [row.logprobs for row in rows]
        scores = Scores(
            label_logprobs=torch.zeros(len(rows), 0) if is_text else torch.tensor(values),
            positions=torch.tensor([len(row.said) for row in rows]),
            completion_logprobs=torch.tensor([value for own in values for value in own] if is_text else []),
            encoded=self._encoded([said for row in rows for said in row.said]),
            label_bounds=None if bounds.isnan().all() else bounds,
        )
        prompts = [row.prompt for row in rows]
        table = stored_rows(prompts, [replace(row.prompt, answer=row.answer) for row in rows], scores)
        counted = [row.said[0].prompt_tokens or row.prompt.length for row in rows]
        field = STORED.field("prompt_tokens")
        return table.set_column(STORED.get_field_index(field.name), field, pa.array(counted, field.type))

    def _encoded(self, said: Sequence[Said]) -> Encoded:
        """The most probable tokens and the mass of the others; of labels nothing if the server tokenises, since students need ids."""
        server = self._server
        size = len(server.tokenizer) if server.sends_ids or self._completion is not None else 0
        count = min(self._cache.top_k, TOP) if size else 0
        ids, logprobs = torch.zeros(len(said), count, dtype=torch.int32), torch.full((len(said), count), -math.inf)
        for number, one in enumerate(said if count else ()):
            listed = {server.id_of(token): value for token, value in one.logprobs.items() if value >= one.floor}
            known = sorted((-value, token) for token, value in listed.items() if token is not None)[:count]
            ids[number, : len(known)] = torch.tensor([token for _, token in known], dtype=torch.int32)
            logprobs[number, : len(known)] = torch.tensor([-value for value, _ in known])
        tail = (1 - logprobs.double().exp().sum(-1)).clamp_min(0.0).float()
        others = max(1, size - count)  # over which the tail is taken to be spread evenly
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
            "entropies": entropy.unsqueeze(-1)[:, : min(1, size)],
            "hidden_states": none.half(),
        }


def server_fidelity(rows: pa.Table, chosen: pa.Table, again: pa.Table) -> dict[str, float]:
    """What is known of a server's answers: `rows` are all (`schema.STORED`); `chosen` are some of them, which were asked `again`.

    Mass of the tokens that are kept, and how often the answer or the most probable label changed. Of labels: those of `censored`, and how
    far probabilities moved between two answers. Of free text: the share of answers that are hard.
    """
    tails = rows["tail_mass"].to_pylist()
    retained = {"retained_mass": 1 - float(np.mean([tail for own in tails for tail in own]))}
    if (written := rows["completion_ids"].to_pylist())[0]:
        kept = zip(rows["topk_ids"].to_pylist(), written, tails, strict=True)
        hard = [not any(own) and ids == [[number] for number in answer] for ids, answer, own in kept]
        changed = [one != other for one, other in zip(*(table["completion_ids"].to_pylist() for table in (chosen, again)), strict=True)]
        return retained | {"hard_answers": float(np.mean(hard)), "changed_answers": float(np.mean(changed))}
    before, now = (np.exp(np.array(table["label_logprobs"].to_pylist())) for table in (chosen, again))
    return {
        **retained,
        **censored(rows),
        "moved_mean": float(np.abs(before - now).mean()),
        "moved_most": float(np.abs(before - now).max()),
        "changed_answers": float((before.argmax(-1) != now.argmax(-1)).mean()),
    }
