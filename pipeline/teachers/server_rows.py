"""Teachers behind servers: rows of the store from what servers say of tokens.

A label's score is asked token by token behind what it begins with, which a server's prefix cache serves; labels that cannot matter any more
are not asked further. A server that lists only its most probable tokens leaves labels *censored*: known to be no more probable than a bound
(`schema.STORED`). Free text is one request; a token that the server cuts off, since it ends the answer, is asked for behind it. Tokens
become ids by their text. An answer that has another token is *hard*: its text is put into ids, and each has all the probability.
"""

import heapq
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.cache.encodings import Encoded, rounded
from pipeline.cache.fidelity import censored
from pipeline.errors import MismatchError, ShotlessError, UsageError
from pipeline.params import CacheParams, CompletionParams
from pipeline.params.methods import SERVER_TOP as TOP
from pipeline.schema import STORED, Prompt
from pipeline.task import TaskTokens
from pipeline.teachers.engines import Scores
from pipeline.teachers.generation import has_ended
from pipeline.teachers.scorer import Job, stored_rows
from pipeline.teachers.server_meeting import empty, has_moved, open_server, probe_answers
from pipeline.teachers.servers import Label, Said, Server, Token

WRITE_SECONDS, WRITE_ROWS = 2.0, 256  # between two writes: what a kill costs at most
NEGLIGIBLE_NATS = math.log(1e4)  # below the best label: a label's further tokens are not asked for


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
