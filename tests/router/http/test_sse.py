"""Following event streams and ending them in an error."""

import json
from itertools import pairwise

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_protocol.routes import TerminalEvent
from xim_router.http.sse import PING, EventBoundary, error_event

CHAT = (
    b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"say data: [DONE]\\n\\n and event: message_stop\\n"}}]}\n\n'
    b"data: [DONE]\n\n"
)
RESPONSE = (
    b'event: response.created\ndata: {"type":"response.created"}\n\n'
    b'event: response.output_text.delta\ndata: {"delta":"event: response.completed\\n"}\n\n'
    b'event: response.completed\ndata: {"response":{"text":"' + b"long " * 100 + b'"}}\n\n'
)
MESSAGES = (
    b'event: message_start\ndata: {"type":"message_start"}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\ndata: [DONE]\n\n'
)
STREAMS = [
    (TerminalEvent.DONE, CHAT),
    (TerminalEvent.RESPONSE, RESPONSE),
    (TerminalEvent.RESPONSE, RESPONSE.replace(b"response.completed\ndata", b"response.failed\ndata")),
    (TerminalEvent.RESPONSE, RESPONSE.replace(b"response.completed\ndata", b"response.incomplete\ndata")),
    (TerminalEvent.MESSAGE_STOP, MESSAGES),
    (TerminalEvent.MESSAGE_STOP, MESSAGES.removesuffix(b"data: [DONE]\n\n")),
]


def follow(terminal: TerminalEvent, *chunks: bytes) -> EventBoundary:
    boundary = EventBoundary(terminal)
    for chunk in chunks:
        boundary.feed(chunk)
    return boundary


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


def ends_of_events(stream: bytes, line_end: bytes) -> set[int]:
    """Every length after which no event is under way, told from the whole stream."""
    ends, at = {0}, 0
    while (found := stream.find(line_end * 2, at)) >= 0:
        at = found + 2 * len(line_end)
        ends.add(at)
    return ends


def test_a_stream_that_has_not_begun_is_at_a_boundary_and_not_complete() -> None:
    for terminal in TerminalEvent:
        boundary = EventBoundary(terminal)
        assert boundary.at_boundary
        assert not boundary.complete


@given(
    stream=st.sampled_from(STREAMS),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
    cuts=st.lists(st.integers(0, 5_000), max_size=30),
)
def test_however_a_stream_is_cut_its_boundaries_and_its_end_are_seen(
    stream: tuple[TerminalEvent, bytes], line_end: bytes, cuts: list[int]
) -> None:
    terminal, text = stream[0], stream[1].replace(b"\n", line_end)
    ends = ends_of_events(text, line_end)
    complete_from = sorted(ends)[-2 if text.endswith(b"[DONE]" + 2 * line_end) and terminal.value != "done" else -1]
    boundary, size = EventBoundary(terminal), 0
    for piece in pieces(text, cuts):
        boundary.feed(piece)
        size += len(piece)
        assert boundary.at_boundary == (size in ends)
        assert boundary.complete == (size in ends and size >= complete_from)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("end", [b"completed", b"incomplete", b"failed"])
def test_the_name_of_the_last_event_is_seen_wherever_it_is_cut(end: bytes, line_end: bytes) -> None:
    before = b"data: {}" + 2 * line_end
    name = b"event: response." + end + line_end
    text = before + name + b'data: {"text":"' + b"long " * 100 + b'"}' + 2 * line_end
    for cut in range(len(before) - 1, len(before) + len(name) + 1):
        assert follow(TerminalEvent.RESPONSE, text[:cut], text[cut:]).complete
    assert follow(TerminalEvent.RESPONSE, *[text[n : n + 1] for n in range(len(text))]).complete


@given(stream=st.sampled_from(STREAMS))
def test_byte_by_byte_a_stream_is_the_same(stream: tuple[TerminalEvent, bytes]) -> None:
    terminal, text = stream
    assert follow(terminal, *[text[n : n + 1] for n in range(len(text))]).complete


@pytest.mark.parametrize(("terminal", "text"), STREAMS)
def test_a_stream_that_lacks_its_last_byte_is_not_complete(terminal: TerminalEvent, text: bytes) -> None:
    assert not follow(terminal, text[:-1]).complete


def test_the_end_of_one_route_is_not_the_end_of_another() -> None:
    assert not follow(TerminalEvent.DONE, RESPONSE).complete
    assert not follow(TerminalEvent.RESPONSE, CHAT).complete
    assert not follow(TerminalEvent.MESSAGE_STOP, CHAT).complete
    assert not follow(TerminalEvent.NONE, CHAT).complete


def test_words_of_an_end_inside_of_data_do_not_end_a_stream() -> None:
    assert not follow(TerminalEvent.DONE, CHAT.removesuffix(b"data: [DONE]\n\n")).complete
    assert not follow(TerminalEvent.MESSAGE_STOP, b'data: {"x":"event: message_stop"}\n\n').complete


def test_a_ping_leaves_a_stream_at_its_boundary() -> None:
    boundary = follow(TerminalEvent.DONE, CHAT.removesuffix(b"data: [DONE]\n\n"), PING)
    assert boundary.at_boundary
    boundary.feed(b"data: [DONE]\n\n")
    assert boundary.complete


# Error events, judged by the client that has to understand them


def client_of(stream: bytes) -> openai.OpenAI:
    """The `openai` client, at the other end of a connection that answers `stream`."""
    headers = {"content-type": "text/event-stream"}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, content=stream))
    return openai.OpenAI(
        api_key="xero_test", base_url="http://router/v1", http_client=httpx2.Client(transport=transport), max_retries=0
    )


def test_the_openai_client_raises_for_a_failed_chat() -> None:
    begun = b'data: {"id":"1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    stream = begun + error_event(TerminalEvent.DONE, "agent_lost")
    with client_of(stream) as client:
        chunks = iter(client.chat.completions.create(model="chat", messages=[], stream=True))
        assert next(chunks).choices[0].delta.content == "a"
        with pytest.raises(openai.APIError, match="agent was lost") as caught:
            next(chunks)
    assert caught.value.code == "agent_lost"


def test_the_openai_client_raises_for_a_failed_response() -> None:
    begun = b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_1"}}\n\n'
    stream = begun + error_event(TerminalEvent.RESPONSE, "stalled", "It stopped.")
    with client_of(stream) as client:
        events = iter(client.responses.create(model="chat", input="hello", stream=True))
        assert next(events).type == "response.created"
        with pytest.raises(openai.APIError, match="It stopped"):
            next(events)


@pytest.mark.parametrize(
    ("code", "kind"),
    [("no_agent_available", "overloaded_error"), ("stalled", "timeout_error"), ("agent_lost", "api_error")],
)
def test_a_failed_message_ends_in_the_error_event_of_its_api(code: str, kind: str) -> None:
    name, data, *rest = error_event(TerminalEvent.MESSAGE_STOP, code, "Sorry.\nTry again.").split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: ")) == {
        "type": "error",
        "error": {"type": kind, "message": "Sorry.\nTry again."},
    }
    assert rest == [b"", b""]


@pytest.mark.parametrize("terminal", TerminalEvent)
def test_an_unfinished_event_is_closed_before_the_error(terminal: TerminalEvent) -> None:
    assert not follow(terminal, CHAT[:20]).at_boundary
    event = error_event(terminal, "agent_lost", at_boundary=False)
    assert event == b"\n\n" + error_event(terminal, "agent_lost")
    ended = follow(terminal, CHAT[:20], event)
    assert ended.at_boundary
    assert not ended.complete
