"""Meeting a server, in the stage `server`: of which kind it is, what it can, and by which answers its model is known again."""

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.errors import ShotlessError, UsageError, choices
from pipeline.files import Folders, read_json, write_json
from pipeline.models.folders import SERVER, load_tokenizer, server_of, tokenizer_sha256
from pipeline.params import ServerParams
from pipeline.params.methods import SERVER_TOP as TOP
from pipeline.schema import Prompt
from pipeline.teachers.servers import KINDS, Label, NotOfferedError, Said, Server

DRIFT_NATS = 0.25  # that probe answers may move: servers' batches change the last bits, other weights change more
PROBES = ("The capital of France is", "2 + 2 =", "Review: a warm and funny film\nSentiment:")
PROBE_TOP = 5
MORE = (2000, 100)  # that a server which gives no other tokens is asked for
UNLISTED = (" Zanzibar", " hexagon")  # texts that the first probe's answer does not begin with


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
