"""The reference page of the router's HTTP routes: a frame in words, the tables from the code."""

from docs.generator.markdown import code, page, table
from xim_protocol.routes import ROUTES, Route, TerminalEvent
from xim_router.dispatch.catalog import TaskMode
from xim_router.http.inference import RELAYED_HEADERS
from xim_router.http.task_mode import TASK_MODES

_INTRO = """\
The router serves clients, enrolling agents and probes on one listener (`XEROTIER_ROUTER_HTTP_HOST`, `_HTTP_PORT`),
and metrics on another ([metrics](metrics.md)). Every answer carries `X-Request-ID`: the client's own when it sent
one of 1 to 128 letters, digits, `.`, `_`, `:` and `-`, else the router's. Errors: [errors](errors.md)."""

_RELAYED = """\
`POST`, a JSON object as the body, `Authorization: Bearer <API key>` (or `x-api-key`, where Anthropic's clients put
it). The body goes to the engine as it is, but for three things that [the agent changes](../explanation/engine.md).
The router itself reads `model`, `stream` and `previous_response_id`; everything else only the engine judges, and
its answers pass through.

Two URL forms:

- `/v1/...`: the key decides the project, and `model` names one of its endpoints, by slug or by the model's own
  name.
- `/{project}/{endpoint}/v1/...`: the URL decides, by the project's *id* and the endpoint's slug; `model` is
  informational. A project is named by its id (`proj_...`), which `xerotier-router project list` shows."""

_AFTER = """\
*Task mode* is that of the endpoints that answer the route, given when one is made (`xerotier-router endpoint create
--task-mode`); any other is answered 400 `task_mode_mismatch`. *Ends with* is the event by which a complete stream
ends; a stream that ends otherwise was cut off. *Salt* says whether the engine knows `cache_salt` on this route. Where
it does not, nothing keeps two projects apart in the prefix cache, so a node serves such routes to the first project
that asks, until its engine is started anew.

`previous_response_id` (Responses API) needs an endpoint that one agent alone serves, since stored responses live in
one engine's memory; otherwise it is answered 400.

Of a client's headers the engine sees these and no other:
{headers}."""

_SMALL_ROUTES = (
    (
        "GET",
        "/v1/models",
        "API key",
        "The endpoints that the key may call, as OpenAI's list of models; `id` is the slug.",
    ),
    ("GET", "/v1/models/{id}", "API key", "One of them, by slug or by the model's own name."),
    ("GET", "/{project}/{endpoint}/v1/models", "API key", "That endpoint alone."),
    ("GET", "/healthz", "", "200 as long as the process runs. Restart it by this one."),
    ("GET", "/readyz", "", "200 when at least one agent serves, else 503 with a `reason`. Route clients by this one."),
    ("POST", "/v1/enroll", "join key in the body", "201 with an agent's credentials; `Cache-Control: no-store`."),
    ("POST", "/v1/enroll/refresh", "refresh token and signature in the body", "200 with new credentials."),
)

_READYZ = """\
`/readyz` answers a JSON object: `status` (`ready`, `starting`, `waiting`, `shutting_down`), `control` (`fresh`,
`stale 42 s` or `unread`: how old the database's last word is), `agents_ready`, `endpoints_ready`, and `reason`
where it is not ready. A router that stops refuses new connections, which a probe sees first; `shutting_down` is for
one that was connected before. A database that is away leaves the router ready: inference goes on with what it
knows. Agents enroll before any agent serves, so a balancer must not keep *them* away by `/readyz`. `HEAD` works
wherever `GET` does.

## What a connection may take

A connection that has not sent the whole head of a request (URL and headers) within 60 s is closed: with 408
`request_incomplete` where a head has begun, without a word where nothing came. The same holds for each later request
of a connection, counted from the first byte of its head. A body must bring 16 KiB in every 60 s, or end, else 408
`request_incomplete`; the whole of it must have come within `XEROTIER_ROUTER_REQUEST_TIMEOUT_S`, which counts from
the end of the head, else 504 `request_timeout`. An answer may be silent for as long as that timeout lets it, and after
an answer a connection is kept for 75 s without a byte.

## Enrollment

Enrollment bodies have at most 64 KiB; who writes an agent of their own finds them in `xim_protocol.enrollment`."""

_ENDS = {
    TerminalEvent.DONE: "`data: [DONE]`",
    TerminalEvent.RESPONSE: "`response.completed`, `.incomplete` or `.failed`",
    TerminalEvent.MESSAGE_STOP: "`message_stop`",
    TerminalEvent.NONE: "",
}


def http_api_page() -> str:
    """docs/reference/http-api.md"""
    headers = ", ".join(code(name.decode()) for name in RELAYED_HEADERS)
    small = [(method, code(path), key, text) for method, path, key, text in _SMALL_ROUTES]
    return page(
        "HTTP API",
        _INTRO,
        "## Relayed routes",
        _RELAYED,
        table(("path", "task mode", "may stream, ends with", "salt"), [_row(route) for route in ROUTES]),
        _AFTER.format(headers=headers),
        "## The router's own routes",
        table(("method", "path", "needs", "answers"), small),
        _READYZ,
    )


def _row(route: Route) -> tuple[str, ...]:
    modes = TASK_MODES[route.path]
    answered = "any" if modes == set(TaskMode) else ", ".join(code(mode.value) for mode in TaskMode if mode in modes)
    return code(route.path), answered, _ENDS[route.terminal], "yes" if route.cache_salt else "no"
