"""A local HTTP server that answers as vLLM, SGLang, llama.cpp or any server of OpenAI's protocol do, with a tiny model; and with faults."""

import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

MODEL = "tiny-1"
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama_cpp": "llamacpp", "openai": "someone"}


class FakeServer:
    """`faults` are what the next requests get: a status, "cut", "slow", "redirect", "text", or a change of the reply."""

    def __init__(self, kind, model, tokenizer, exact=True, ids=True, completions=True, listed=20):
        self.kind, self.model, self.tokenizer, self.listed = kind, model, tokenizer, listed
        self.exact, self.ids, self.completions = exact, ids, completions
        self.name, self.faults, self.asked, self.headers, self.shift = MODEL, [], [], [], 0.0
        self.inside = self.most_inside = 0
        self.lock = threading.Lock()

    @torch.no_grad()
    def logprobs(self, ids):
        logits = self.model(torch.tensor([list(ids)])).logits[0].double()
        logits[:, 7] += self.shift
        return logits.log_softmax(-1)

    def text(self, token):
        return self.tokenizer.decode([token])

    def tokens(self, prompt):
        if isinstance(prompt, str):
            return self.tokenizer(prompt, add_special_tokens=False).input_ids
        assert self.ids
        return prompt

    def top(self, row, count):
        values, tokens = row.topk(min(count, self.listed))
        return list(zip(tokens.tolist(), values.tolist(), strict=True))

    def written(self, prompt, settings, most="max_tokens"):
        """Greedy tokens, each's log-probabilities, how many servers show that cut off the end, and whether there is an end."""
        tokens, rows, ended = [], [], False
        while len(tokens) < settings.get(most, 1) and not ended:
            rows.append(self.logprobs([*prompt, *tokens])[-1])
            tokens.append(int(rows[-1].argmax()))
            text = self.tokenizer.decode(tokens)
            ended = tokens[-1] == self.tokenizer.eos_token_id or any(stop in text for stop in settings.get("stop", ()))
        return tokens, rows, len(tokens) - ended, ended

    def reply(self, path, body):
        """Status and JSON."""
        if path == "/v1/models":
            return 200, {"data": [{"id": MODEL, "owned_by": OWNERS[self.kind], **({"max_model_len": 512} if self.kind == "vllm" else {})}]}
        if path == "/props" and self.kind == "llama_cpp":
            return 200, {"default_generation_settings": {"n_ctx": 512}}
        if path == "/v1/completions" and self.completions and self.kind != "llama_cpp":
            return self.openai(body)
        if path == "/generate" and self.kind == "sglang":
            return self.sglang(body)
        if path == "/completion" and self.kind == "llama_cpp":
            return self.llama_cpp(body)
        if path == "/v1/chat/completions":
            prompt = self.tokens("".join(f"{turn['role']}: {turn['content']}\n" for turn in body["messages"]))
            tokens, rows, shown, ended = self.written(prompt, body)

            def entry(token, value):
                return {"token": self.text(token), "logprob": value, "bytes": list(self.text(token).encode())}

            content = [
                entry(token, float(row[token])) | {"top_logprobs": [entry(*one) for one in self.top(row, body["top_logprobs"])]}
                for token, row in zip(tokens[:shown], rows, strict=False)
            ]
            choice = {"message": {"content": self.tokenizer.decode(tokens[:shown])}, "finish_reason": "stop" if ended else "length"}
            usage = {"prompt_tokens": 9, "completion_tokens": len(tokens)}
            return 200, {"model": self.name, "choices": [choice | {"logprobs": {"content": content}}], "usage": usage}
        return 404, {"error": f"no {path}"}

    def openai(self, body):
        if not self.ids and not isinstance(body["prompt"], str):
            return 400, {"error": "prompt: not a text"}
        assert body["max_tokens"]  # some servers take 0 for no end
        prompt, rows = self.tokens(body["prompt"]), None
        rows = self.logprobs(prompt)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 1}
        if body.get("echo"):
            if not self.exact or self.kind != "openai":
                return 400, {"error": "echo is not offered"}
            texts = [self.text(token) for token in prompt]
            values = [None, *(float(rows[at, token]) for at, token in enumerate(prompt[1:])), float(rows[-1].max())]
            starts = [len("".join(texts[:at])) for at in range(len(texts) + 1)]
            return 200, {"model": self.name, "choices": [{"logprobs": {"token_logprobs": values, "text_offset": starts}}], "usage": usage}
        asked = body.get("logprob_token_ids") if self.exact and self.kind == "vllm" else None
        assert asked is None or len(asked) <= 128
        as_ids = self.kind == "vllm" and body.get("return_tokens_as_token_ids")

        def named(token):
            return f"token_id:{token}" if as_ids else self.text(token)

        tokens, rows, shown, ended = self.written(prompt, body)
        shown = len(tokens) if self.kind == "vllm" else shown
        logprobs = {
            "tokens": [named(token) for token in tokens[:shown]],
            "token_logprobs": [float(row[token]) for token, row in zip(tokens[:shown], rows, strict=False)],
            "top_logprobs": [
                {
                    named(token): value
                    for token, value in (self.top(row, body["logprobs"]) if asked is None else zip(asked, row[asked].tolist(), strict=True))
                }
                for row in rows[:shown]
            ],
        }
        choice = {"text": self.tokenizer.decode(tokens[:shown]), "logprobs": logprobs, "finish_reason": "stop" if ended else "length"}
        return 200, {"model": self.name, "choices": [choice], "usage": usage | {"completion_tokens": len(tokens)}}

    def sglang(self, body):
        prompt = self.tokens(body["input_ids"] if "input_ids" in body else body["text"])
        tokens, rows, _, ended = self.written(prompt, body["sampling_params"], "max_new_tokens")

        def entry(token, value):
            return [value, token, self.text(token) if body["return_text_in_logprobs"] else None]

        about = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "finish_reason": {"type": "stop" if ended else "length"},
            "output_token_logprobs": [entry(token, float(row[token])) for token, row in zip(tokens, rows, strict=True)],
            "output_top_logprobs": [[entry(*one) for one in self.top(row, body["top_logprobs_num"])] for row in rows],
        }
        named = [[float(rows[0][token]), token, None] for token in body.get("token_ids_logprob", ())]
        text = self.tokenizer.decode(tokens)
        return 200, {"text": text, "meta_info": about | ({"output_token_ids_logprobs": [named]} if self.exact else {})}

    def llama_cpp(self, body):
        assert body["post_sampling_probs"] is False
        prompt = self.tokens(body["prompt"])
        tokens, rows, shown, ended = self.written(prompt, body, "n_predict")
        if self.exact and body.get("logit_bias"):
            tokens, shown = [body["logit_bias"][0][0]], 1

        def entry(token, value):
            return {"id": token, "token": self.text(token), "bytes": list(self.text(token).encode()), "logprob": value}

        positions = [
            entry(token, float(row[token])) | {"top_logprobs": [entry(*one) for one in self.top(row, body["n_probs"])]}
            for token, row in zip(tokens[:shown], rows, strict=False)
        ]
        about = {"tokens_evaluated": len(prompt), "tokens_predicted": len(tokens), "stop_type": "word" if ended else "limit"}
        return 200, {"model": self.name, "content": self.tokenizer.decode(tokens[:shown]), "completion_probabilities": positions} | about

    @contextmanager
    def running(self):
        """The server's address."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, body):
                with fake.lock:
                    fake.asked.append((self.path, body))
                    fake.headers.append(dict(self.headers))
                    fake.inside += 1
                    fake.most_inside = max(fake.most_inside, fake.inside)
                    fault = fake.faults.pop(0) if fake.faults else None
                try:
                    status, reply = fake.reply(self.path, body)
                    self.send(fault, status, reply)
                finally:
                    with fake.lock:
                        fake.inside -= 1

            def send(self, fault, status, reply):
                headers = {}
                if isinstance(fault, int):
                    status, headers = fault, {"Retry-After": "0"} if fault == 429 else {}
                elif fault == "redirect":
                    status, headers = 302, {"Location": "http://elsewhere.example/v1"}
                elif callable(fault):
                    reply = fault(reply)
                text = b"not json" if fault == "text" else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if fault == "cut":
                    self.wfile.write(text[: len(text) // 2])
                    self.close_connection = True
                    return
                if fault == "slow":
                    for at in range(0, len(text), 50):
                        time.sleep(0.2)
                        try:
                            self.wfile.write(text[at : at + 50])
                            self.wfile.flush()
                        except OSError:
                            return
                    return
                with suppress(ConnectionError):  # who asked may have been killed
                    self.wfile.write(text)

            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
