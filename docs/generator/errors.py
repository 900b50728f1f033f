"""The reference page of every error that somebody is told: clients, enrolling agents, linked agents."""

import re

from docs.generator.markdown import code, page, table
from docs.generator.words import docs_of_members
from xim_agent.link.ends import LinkCause, LinkEnd, LinkStopped, remedy_for, stop_for
from xim_protocol.enrollment import FAILURES
from xim_protocol.errors import FaultReason, RemoteProtocolError
from xim_protocol.messages import FailCode, GoodbyeCode, RefusalReason
from xim_router.dispatch.effects import Rejection
from xim_router.http.errors import ERRORS
from xim_router.http.rejections import REJECTIONS
from xim_router.http.response import FAILURES as FAILED_STREAMS

_CLIENT = """\
Every error of the router has OpenAI's envelope, `{"error": {"message", "type", "code", "param"}}`, and every answer
an `X-Request-ID`. Branch on `code`: it is stable, the message is not. The status decides which exception the
`openai` client raises. A 401 carries `WWW-Authenticate: Bearer`, a 405 `Allow`.

An engine's own answers, errors among them, pass through as vLLM wrote them and are not in this table. Once the
first byte of an event stream was given to the client, an error is the stream's last event, `data: {"error": ...}`,
and no `[DONE]` follows; any other body ends by a connection closed unfinished."""

_REJECTIONS = """\
Why the dispatcher turns a request away, and the code that the client gets. See
[admission](../explanation/admission.md)."""

_STREAMS = """\
Why a request failed after an agent took it, as agent and router say it on the wire, and the code that the client
gets. Before the commit point `agent_lost` and `engine_unavailable` are dispatched once more first."""

_REFUSALS = """\
Why an agent did not take a stream. A refusal is no attempt: the request goes to another agent, or back to the head
of its queue. `route` alone is answered at once, as `invalid_body`, because every agent would say the same."""

_ENROLLMENT = """\
What `xerotier-xim-agent` prints, with its remedy, when it cannot enroll, refresh or connect. The router answers
those that have a status; the agent finds the others by itself. Both ends have them from one table."""

_GOODBYES = """\
How a session ends when one end says so. An agent that is told not to come again exits with status 3 and the remedy."""

_FAULTS = """\
What ends a session because the peer broke the protocol, as the label `reason` of
`xim_router_protocol_faults_total`. The session ends with `protocol_error`; other agents and streams do not notice."""

_ARGUMENT = re.compile(r" \([^)]*\bNone\b[^)]*\)")
"""What a docstring says to programmers alone."""


def errors_page() -> str:
    """docs/reference/errors.md"""
    return page(
        "Errors",
        "## What a client is answered",
        _CLIENT,
        _client_table(),
        "## Why a request is turned away",
        _REJECTIONS,
        _rejection_table(),
        "## Why a stream fails",
        _STREAMS,
        _stream_table(),
        "## Why an agent refuses a stream",
        _REFUSALS,
        _enum_table(RefusalReason),
        "## Enrollment, refresh and reaching the router",
        _ENROLLMENT,
        _enrollment_table(),
        "## How a session ends",
        _GOODBYES,
        _goodbye_table(),
        "## Protocol faults",
        _FAULTS,
        _fault_table(),
    )


def _client_table() -> str:
    own = {name: rule for name, rule in ERRORS.items() if name not in FAILURES}
    rows = [
        (
            code(name),
            str(rule.status),
            code(rule.type),
            "" if rule.retry_after_s is None else f"{rule.retry_after_s} s",
            rule.message,
        )
        for name, rule in own.items()
    ]
    return table(("code", "status", "type", "Retry-After", "message, where nothing more exact is said"), rows)


def _rejection_table() -> str:
    meanings = docs_of_members(Rejection)
    rows = [(code(each.value), meanings[each.name], code(REJECTIONS[each][0])) for each in Rejection]
    return table(("reason", "when", "code"), rows)


def _stream_table() -> str:
    meanings = docs_of_members(FailCode)
    rows = [
        (code(each.value), meanings.get(each.name) or ERRORS[FAILED_STREAMS[each][0]].message, _code_of(each))
        for each in FailCode
    ]
    return table(("on the wire", "when", "code"), rows)


def _code_of(failure: FailCode) -> str:
    return code(FAILED_STREAMS[failure][0])


def _enum_table(kind: type[RefusalReason]) -> str:
    meanings = docs_of_members(kind)
    plain = {
        RefusalReason.AT_CAPACITY: "Every slot is taken, perhaps by streams of other routers.",
        RefusalReason.DRAINING: "The agent takes nothing new.",
        RefusalReason.NOT_READY: "The engine does not serve.",
    }
    rows = [(code(each.value), plain.get(each) or meanings[each.name]) for each in kind]
    return table(("reason", "when"), rows)


def _enrollment_table() -> str:
    rows = [
        (
            code(name.value),
            "the agent" if failure.status is None else str(failure.status),
            failure.message,
            failure.remedy,
        )
        for name, failure in FAILURES.items()
    ]
    return table(("code", "status", "what it means", "what to do"), rows)


def _goodbye_table() -> str:
    meanings = docs_of_members(GoodbyeCode)
    rows = [(code(each.value), meanings[each.name], *_reaction(each)) for each in GoodbyeCode]
    return table(("code", "what it means", "the agent", "what to do"), rows)


def _reaction(goodbye: GoodbyeCode) -> tuple[str, str]:
    """What the agent does when a router says so, and the remedy that it prints; asked of the code that does it."""
    if goodbye is GoodbyeCode.LEAVING:
        return "says it", ""
    end = LinkEnd(cause=LinkCause.GOODBYE, code=goodbye)
    stopped = stop_for(end)
    if isinstance(stopped, LinkStopped):
        return "exits", stopped.remedy
    return "comes again", remedy_for(end)


def _fault_table() -> str:
    kinds: dict[FaultReason, str] = {}
    for kind in RemoteProtocolError.__subclasses__():
        first = (kind.__doc__ or "").strip().splitlines()[0]
        kinds[kind.reason] = _ARGUMENT.sub("", first)
    return table(("reason", "fault"), [(code(each.value), kinds[each]) for each in FaultReason])
