"""A small server with OpenAI's API for tests: real HTTP, a model of numpy, and faults on request."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

OPENAI = {
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stream",
    "logprobs",
    "top_logprobs",
}
Model = Callable[
    [list[int], int], np.ndarray
]  # (token ids so far, how many of them are the answer's) → logits


def bigram(matrices: tuple[np.ndarray, np.ndarray], scale: float = 1.0) -> Model:
    """The toy's model of tests/toys/numpy_toy.py, its logits times `scale`."""
    return lambda ids, step: scale * (matrices[0][ids[-1]] @ matrices[1])


def script(ids: list[int], vocabulary: int, end: int) -> Model:
    """A model that says `ids` and ends."""

    def logits(_: list[int], step: int) -> np.ndarray:
        row = np.zeros(vocabulary, np.float32)
        row[ids[step] if step < len(ids) else end] = 20.0
        return row

    return logits


class OpenAIServer:
    """`with OpenAIServer(…) as server: server.url`.

    Args:
        forms: what it takes: "ids", "text", "chat".
        fields: names of request fields that it takes beyond OpenAI's own; None: any.
        gives_ids: whether pieces hold the token ids, as vLLM's do.
        top: how many log-probabilities it gives at most; more are refused.
        template_tokens: of a template that it puts around a text of /completions, as Ollama does.
        fault: what goes wrong, once `healthy` POST requests were answered; `do_POST` has the names.
    """

    def __init__(self, tokenizer, model: Model, *, forms=("ids", "text", "chat"), fields=None, gives_ids=False, top=20,
                 models=("tiny",), owned_by="test", template_tokens=0):  # fmt: skip
        self.tokenizer, self.model = tokenizer, model
        self.forms, self.fields, self.gives_ids, self.top = forms, fields, gives_ids, top
        self.models, self.owned_by, self.template_tokens = models, owned_by, template_tokens
        self.fault: str | None = None
        self.healthy = 0
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.sent = 0  # tokens
        self.closed = threading.Event()
        self.hung_up = threading.Event()
        self.token_s = 0.0
        self.models_broken = False
        self.drops = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: OpenAIServer

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        owner = self.owner
        if self.path != "/v1/models" or owner.models_broken:
            return self._json(500 if owner.models_broken else 404, {"detail": "Not Found"})
        self._json(
            200,
            {
                "object": "list",
                "data": [{"id": m, "object": "model", "owned_by": owner.owned_by} for m in owner.models],
            },
        )

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        owner.requests.append((self.path, dict(self.headers), body))
        if owner.drops:  # as where an idle connection is ended while a request is on its way
            owner.drops -= 1
            self.close_connection = True
            return
        owner.healthy -= 1
        if owner.fault and owner.healthy < 0 and self._fail(owner.fault):
            return
        if refusal := self._refusal(body):
            return self._json(refusal[0], {"error": {"message": refusal[1]}})
        ids = self._prompt_ids(body)
        steps = self._steps(body, ids)
        if body.get("stream"):
            self._stream(body, ids, steps)
        else:
            self._whole(body, ids, steps)

    # ------------------------------------------------------------ what it takes

    def _refusal(self, body: dict) -> tuple[int, str] | None:
        owner = self.owner
        form = "chat" if "messages" in body else "text" if isinstance(body["prompt"], str) else "ids"
        if body["model"] not in owner.models:
            return 404, f"The model `{body['model']}` does not exist."
        if form not in owner.forms:
            return 400, f"{form} is not taken here."
        if owner.fields is not None and (unknown := body.keys() - OPENAI - set(owner.fields)):
            return 422, f"Unexpected fields in the request: {sorted(unknown)}"
        wanted = body.get("top_logprobs") if form == "chat" else body.get("logprobs")
        if wanted and wanted > owner.top:
            return 400, f"logprobs must be at most {owner.top}"
        return None

    def _prompt_ids(self, body: dict) -> list[int]:
        if "messages" in body:
            text = self.owner.tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True
            )
            return self.owner.tokenizer(text)["input_ids"]
        if isinstance(body["prompt"], str):
            return self.owner.tokenizer(body["prompt"])["input_ids"]
        return body["prompt"]

    def _steps(self, body: dict, prompt: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(token, log-probabilities), without the end."""
        ids = list(prompt)
        for step in range(body["max_tokens"]):
            logits = self.owner.model(ids, step).astype(np.float64)
            log_p = logits - logits.max()
            log_p -= np.log(np.exp(log_p).sum())
            token = int(log_p.argmax())
            if token == self.owner.tokenizer.eos_token_id:
                return
            ids.append(token)
            yield token, log_p

    # ------------------------------------------------------------ answers

    def _choice(self, body: dict, tokens: list[tuple[int, np.ndarray]], finish: str | None) -> dict:
        ids = [token for token, _ in tokens]
        text = self.owner.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        choice: dict = {"index": 0, "finish_reason": finish}
        if "messages" in body:
            choice["delta" if body.get("stream") else "message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        if self.owner.gives_ids and body.get("return_token_ids"):
            choice["token_ids"] = ids
        count = body.get("top_logprobs") if "messages" in body else body.get("logprobs")
        if count and self.owner.top:
            choice["logprobs"] = {"content": [self._position(token, log_p, count) for token, log_p in tokens]}
        return choice

    def _position(self, token: int, log_p: np.ndarray, count: int) -> dict:
        def entry(i: int) -> dict:
            return {"id": int(i), "token": self.owner.tokenizer.decode([i]), "logprob": float(log_p[i])}

        return {**entry(token), "top_logprobs": [entry(i) for i in np.argsort(-log_p)[:count]]}

    def _usage(self, body: dict, ids: list[int], count: int) -> dict:
        wrapped = self.owner.template_tokens if isinstance(body.get("prompt"), str) else 0
        return {"prompt_tokens": len(ids) + wrapped, "completion_tokens": count}

    def _whole(self, body: dict, ids: list[int], steps: Iterator) -> None:
        tokens = list(steps)
        finish = "length" if len(tokens) == body["max_tokens"] else "stop"
        self._json(
            200,
            {"choices": [self._choice(body, tokens, finish)], "usage": self._usage(body, ids, len(tokens))},
        )

    def _stream(self, body: dict, ids: list[int], steps: Iterator) -> None:
        self._start()
        count = 0
        try:
            for token in steps:
                time.sleep(self.owner.token_s)
                self._piece({"choices": [self._choice(body, [token], None)]})
                self.owner.sent += 1
                count += 1
            finish = "length" if count == body["max_tokens"] else "stop"
            self._piece({"choices": [self._choice(body, [], finish)], "usage": self._usage(body, ids, count)})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except OSError:  # the other side has ended the connection
            self.owner.hung_up.set()
            self.close_connection = True

    def _start(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def _piece(self, value: dict) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    # ------------------------------------------------------------ faults

    def _fail(self, fault: str) -> bool:
        """Whether the request was dealt with."""
        piece = {"choices": [{"index": 0, "text": " a", "finish_reason": None}]}
        if fault.isdigit():
            key = self.headers.get("authorization", "")
            self._json(int(fault), {"error": {"message": f"sorry, not for {key}"}})
        elif fault == "slow":
            self.owner.closed.wait(20)
        elif fault == "redirect":
            self.send_response(307)
            self.send_header("location", self.owner.url + "/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()
        elif fault == "cut":
            self._start()
            self._piece(piece)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "unfinished":  # ends without saying how
            self._start()
            self._piece(piece)
            self._chunk(b"")
        elif fault == "json":
            self._start()
            self._chunk(b'data: {"choices": [{"text": \n\n')
            self._chunk(b"")
        elif fault == "page":
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", "13")
            self.end_headers()
            self.wfile.write(b"<html></html>")
        elif fault == "line":
            self._start()
            try:
                for _ in range(100):
                    self._chunk(b"x" * 100_000)
            except OSError:
                self.owner.hung_up.set()
            self.close_connection = True
        elif fault == "error":  # in the middle of a stream, as vLLM and llama-server say it
            self._start()
            self._piece({"error": {"message": "the engine is dead"}})
            self._chunk(b"")
        else:
            return False
        return True
