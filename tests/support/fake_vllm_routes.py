"""The routes of the fake engine: what vLLM checks, in its order, and what it then answers."""

import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from http import HTTPStatus

from tests.support import fake_vllm_dialect as dialect
from tests.support.fake_vllm_compute import ROUTES, Identity, prompt_of
from tests.support.fake_vllm_dialect import JSON, Dialect, Reply, encoded
from tests.support.fake_vllm_engine import Engine, Run
from tests.support.fake_vllm_errors import ANTHROPIC, Refusal, bad_value, invalid, no_such_model, not_json_type
from tests.support.fake_vllm_http import LAST_CHUNK, Connection, Request, http_chunk, response_head
from tests.support.fake_vllm_script import Script, ScriptError, expected_text, script_of, token_limit

VERSION = "0.32.0"
_JSON = "application/json"
_CORE_DIED = {
    "error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "param": None, "code": 500}
}
_SSE = "text/event-stream; charset=utf-8"


class Api:
    """All routes. `handle` answers, or hands a `Run` to the engine."""

    def __init__(self, engine: Engine, identity: Identity, defaults: Script) -> None:
        self.engine, self.identity, self.defaults = engine, identity, defaults
        self._get: dict[str, Callable[[], tuple[str, bytes]]] = {
            "/health": lambda: ("text/plain; charset=utf-8", b""),
            "/version": lambda: (_JSON, encoded({"version": VERSION})),
            "/load": lambda: (_JSON, encoded({"server_load": len(engine.running) + len(engine.waiting)})),
            "/v1/models": self._models,
            "/metrics": self._metrics,
        }
        self._generate: dict[str, tuple[Dialect, str]] = {
            "/v1/chat/completions": (dialect.Chat(), "messages"),
            "/v1/completions": (dialect.Completion(), "prompt"),
            "/v1/responses": (dialect.Responses(), "input"),
            ANTHROPIC: (dialect.Messages(), "messages"),
        }

    def handle(self, connection: Connection, request: Request) -> None:
        """Answer one request."""
        try:
            self._authorize(request)
            if request.path in self._get:
                self._only("GET", request)
                connection.respond(200, *self._get[request.path]())
            else:
                self._submit(connection, request)
        except Refusal as refusal:
            connection.respond(refusal.status, _JSON, refusal.body(request.path))

    # -- checks -------------------------------------------------------------------------------------------------

    def _authorize(self, request: Request) -> None:
        key = self.identity.api_key
        if key and request.path.startswith("/v1") and request.headers.get("authorization") != f"Bearer {key}":
            raise Refusal(401, "Unauthorized")

    def _only(self, method: str, request: Request) -> None:
        if request.method != method:
            raise Refusal(405, "Method Not Allowed")

    def _submit(self, connection: Connection, request: Request) -> None:
        if request.path not in self._generate and request.path not in ROUTES:
            raise Refusal(404, "Not Found")
        self._only("POST", request)
        body = self._body_of(request)
        # A text that is only to be cut into tokens may well be another request's, script and all.
        written = {"user": body.get("user")} if request.path == "/tokenize" else body
        try:
            script = script_of(written, self.defaults)
        except ScriptError as error:
            raise Refusal(400, f"fake_vllm: {error}") from error
        if script.status != 200:
            kind = "InternalServerError" if script.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "BadRequestError"
            raise Refusal(script.status, f"fake_vllm: status {script.status}, as the request asked", kind=kind)
        run = self._run(connection, request, body, script)
        connection.run = run
        self.engine.submit(run)

    def _run(self, connection: Connection, request: Request, body: JSON, script: Script) -> Run:
        if request.path in self._generate:
            spoken, required = self._generate[request.path]
            self._check(body, required)
            name = request.headers.get("x-request-id") or uuid.uuid4().hex
            return self._generation(connection, spoken, name, body, script)
        compute, required = ROUTES[request.path]
        self._check(body, required)
        answer = {"echo": body} if script.echo else compute(body, self.identity)
        self.engine.prompt_tokens += answer.get("usage", {}).get("total_tokens", 0)
        encoded_answer = encoded(answer)
        head = response_head(200, _JSON, len(encoded_answer))
        return Run(connection, replace(script, interval_ms=0.0), head, iter(()), 0, encoded_answer)

    def _body_of(self, request: Request) -> JSON:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
            raise not_json_type()
        try:
            body = json.loads(request.body)
        except ValueError as error:
            raise invalid("json_invalid", str(getattr(error, "pos", 0)), "JSON decode error") from error
        if not isinstance(body, dict):
            raise invalid("model_attributes_type", "", "Input should be a valid dictionary")
        return body

    def _check(self, body: JSON, required: str) -> None:
        """vLLM's own checks, in its order: the form of the body first, then the model, then the values."""
        if required and body.get(required) in (None, [], ""):
            raise invalid("missing", required, "Field required")
        model = body.get("model")
        if model is not None and model not in self.identity.served_names:
            raise no_such_model(model)
        temperature = body.get("temperature")
        if temperature is not None and (not isinstance(temperature, (int, float)) or temperature < 0):
            raise bad_value(f"temperature must be non-negative, got {temperature}.", "temperature")
        choices = body.get("n")
        if choices is not None and (not isinstance(choices, int) or choices < 1):
            raise bad_value(f"n must be at least 1, got {choices}.", "n")

    # -- generating routes --------------------------------------------------------------------------------------

    def _generation(self, connection: Connection, spoken: Dialect, name: str, body: JSON, script: Script) -> Run:
        reply = self._silent_reply(spoken, name, body, script)
        frames = [spoken.frame(reply, index) for index in range(len(reply.texts))]
        chars = script.text_chars or max(1, script.chunk_bytes - len(frames[0][0]) - len(frames[0][1]) - 2)
        if script.echo:
            text = json.dumps(body)
            script = replace(script, chunks=-(-len(text) // chars))
            reply = replace(reply, texts=(text,) * len(reply.texts), pieces=script.chunks)
        else:
            texts = (expected_text(script.seed + index, chars * script.chunks) for index in range(len(reply.texts)))
            reply = replace(reply, texts=tuple(texts))
        self.engine.prompt_tokens += reply.prompt_tokens
        if not body.get("stream"):
            return self._whole(connection, spoken, reply, script)
        opening = b"".join(map(http_chunk, spoken.opening(reply)))
        parts = _parts(opening, frames, reply.texts, chars)
        tail = self._tail(spoken, reply, script)
        run = Run(connection, script, response_head(200, _SSE, None), parts, script.chunks, tail)
        run.finish_reason = "" if script.truncate or script.error_event_after is not None else reply.finish_reason
        return run

    def _silent_reply(self, spoken: Dialect, name: str, body: JSON, script: Script) -> Reply:
        limit = token_limit(body)
        return Reply(
            id=spoken.id_prefix + name,
            model=self.identity.model_of(body),
            created=int(time.time()),
            texts=("",) * (body.get("n") or 1),
            pieces=script.chunks,
            prompt_tokens=len(prompt_of(body).split()),
            finish_reason="length" if limit is not None and script.chunks >= limit else "stop",
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        )

    def _tail(self, spoken: Dialect, reply: Reply, script: Script) -> bytes:
        if script.error_event_after is not None:
            return http_chunk(dialect.event(_CORE_DIED)) + http_chunk(dialect.DONE) + LAST_CHUNK
        if script.truncate:
            return LAST_CHUNK
        return b"".join(map(http_chunk, spoken.closing(reply))) + LAST_CHUNK

    def _whole(self, connection: Connection, spoken: Dialect, reply: Reply, script: Script) -> Run:
        answer = encoded(spoken.whole(reply))
        if script.body_bytes is not None:
            empty = len(encoded(spoken.whole(replace(reply, texts=("",) * len(reply.texts)))))
            text = expected_text(script.seed, max(0, script.body_bytes - empty))
            answer = encoded(spoken.whole(replace(reply, texts=(text, *("",) * (len(reply.texts) - 1)))))
        run = Run(connection, script, response_head(200, _JSON, len(answer)), iter(()), 0, answer)
        run.finish_reason, run.tokens = reply.finish_reason, reply.completion_tokens
        return run

    # -- what the engine says of itself -------------------------------------------------------------------------

    def _models(self) -> tuple[str, bytes]:
        me = self.identity
        cards = [
            {
                "id": name,
                "object": "model",
                "created": int(time.time()),
                "owned_by": "vllm",
                "root": me.model_path,
                "parent": None,
                "max_model_len": me.max_model_len,
            }
            for name in me.served_names
        ]
        return _JSON, encoded({"object": "list", "data": cards})

    def _metrics(self) -> tuple[str, bytes]:
        engine = self.engine
        labels = f'engine="0",model_name="{self.identity.served_names[0]}"'
        rows: list[tuple[str, str, str, float]] = [
            ("gauge", "num_requests_running", labels, len(engine.running)),
            ("gauge", "num_requests_waiting", labels, len(engine.waiting)),
            ("gauge", "kv_cache_usage_perc", labels, len(engine.running) / engine.slots),
            ("counter", "prompt_tokens_total", labels, engine.prompt_tokens),
            ("counter", "generation_tokens_total", labels, engine.generation_tokens),
            *(
                ("counter", "request_success_total", f'{labels},finished_reason="{reason}"', count)
                for reason, count in engine.finished.items()
            ),
        ]
        lines: list[str] = []
        for name, group in itertools.groupby(rows, key=lambda row: row[1]):
            values = list(group)
            family = name.removesuffix("_total") if values[0][0] == "counter" else name
            lines += [
                f"# HELP vllm:{name} {family}, as the fake engine counts it.",
                f"# TYPE vllm:{name} {values[0][0]}",
            ]
            lines += [f"vllm:{name}{{{row[2]}}} {float(row[3])}" for row in values]
        return "text/plain; version=0.0.4; charset=utf-8", ("\n".join(lines) + "\n").encode()


def _parts(opening: bytes, frames: list[tuple[bytes, bytes]], texts: tuple[str, ...], chars: int) -> Iterator[bytes]:
    """What each step writes: one event per choice; the first step carries the opening too."""
    for start in range(0, len(texts[0]), chars):
        events = (
            http_chunk(before + encoded(text[start : start + chars]) + after)
            for (before, after), text in zip(frames, texts, strict=True)
        )
        yield opening + b"".join(events)
        opening = b""
