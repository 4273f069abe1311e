"""Servers of language models: vLLM, SGLang, llama.cpp's, and others that speak OpenAI's protocol and give log-probabilities.

Each kind of server answers one question, `write`: a text behind a prompt, with the most probable tokens at each of its tokens. The key is
in the headers of requests alone.

Of real servers only llama-cpp-python's, of OpenAI's protocol, was run (docs/teachers.md). vLLM, SGLang and llama.cpp's `llama-server` were
built to their documented fields.
"""

import json
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from pipeline.errors import MismatchError, ShotlessError, UsageError, choices
from pipeline.params import ServerParams
from pipeline.params.methods import SERVER_TOP as TOP
from pipeline.schema import Prompt

ATTEMPTS = 8
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
NO_PROBABILITY = -100.0  # nats: servers write it as -inf, as -9999 or as float32's lowest
ROUNDING = 1e-3  # nats over 0 that a log-probability may have
LEAST_MASS = 1e-9  # of what a server does not list, since its numbers are rounded

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
