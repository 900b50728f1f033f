"""The usage report: read always, taken out where it was not asked for, all other bytes as they were."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.engine.usage import REPORT_BYTES, TokenUsage, UsageReader, usage_reader

SSE = "text/event-stream; charset=utf-8"
REPORT = (
    b'data: {"id":"c","object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":7,"total_tokens":12,'
    b'"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
SEEN = TokenUsage(prompt=7, completion=5, cached=4)


def event(text: str) -> bytes:
    fields = {"choices": [{"delta": {"content": text}}], "usage": None}
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def passed(reader: UsageReader, pieces: list[bytes]) -> bytes:
    return b"".join(reader.feed(piece) for piece in pieces) + reader.finish()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def test_ordinary_chunks_are_passed_on_as_the_same_object() -> None:
    reader = usage_reader(SSE, take_out=True, fingerprint=None)
    chunk = event("a") + event("b")
    assert reader.feed(chunk) is chunk


@given(st.lists(st.text(max_size=40), max_size=6), st.lists(st.integers(min_value=0), max_size=8))
def test_wherever_the_stream_is_cut_only_the_report_is_missing(texts: list[str], places: list[int]) -> None:
    before = b"".join(event(text) for text in texts)
    reader = usage_reader(SSE, take_out=True, fingerprint=None)
    assert passed(reader, cut(before + REPORT + DONE, places)) == before + DONE
    assert reader.usage() == SEEN


@given(st.binary(max_size=400), st.lists(st.integers(min_value=0), max_size=8), st.booleans())
def test_any_other_bytes_are_always_unchanged(data: bytes, places: list[int], take_out: bool) -> None:
    reader = usage_reader(SSE, take_out=take_out, fingerprint=None)
    assert passed(reader, cut(data, places)) == data
    assert reader.usage() is None


@given(st.integers(min_value=0, max_value=40), st.lists(st.integers(min_value=0), max_size=6))
def test_events_longer_than_a_report_pass_unchanged(extra: int, places: list[int]) -> None:
    long = event("x" * (REPORT_BYTES + extra)) + event("y")
    reader = usage_reader(SSE, take_out=True, fingerprint=None)
    assert passed(reader, cut(long + REPORT + DONE, places)) == long + DONE
    assert reader.usage() == SEEN


def test_a_long_event_is_not_held_back() -> None:
    reader = usage_reader(SSE, take_out=True, fingerprint=None)
    assert len(reader.feed(b"data: " + b"x" * (REPORT_BYTES + 1))) > REPORT_BYTES


@given(st.lists(st.integers(min_value=0), max_size=8))
def test_the_fingerprint_goes_back_to_where_it_stands_without_the_report(places: list[int]) -> None:
    last = b'data: {"choices":[{"index":%d,"delta":{"content":"z"},"finish_reason":"stop","stop_reason":null}]%s}\n\n'
    mark = b',"system_fingerprint":"vllm-0.32.0-b0ee1ea5"'
    asked = last % (0, b"") + event("a") + last % (1, b"") + REPORT[:-3] + mark + b"}\n\n" + DONE
    reader = usage_reader(SSE, take_out=True, fingerprint="vllm-0.32.0-b0ee1ea5")
    assert passed(reader, cut(asked, places)) == last % (0, mark) + event("a") + last % (1, mark) + DONE
    assert reader.usage() == SEEN


def test_usage_travels_as_the_engines_own() -> None:
    assert SEEN.for_wire() == (7, 5, 4, "engine")


def test_a_model_that_writes_about_usage_is_not_mistaken() -> None:
    chunk = event('{"choices":[],"usage":{"prompt_tokens":1}}')
    reader = usage_reader(SSE, take_out=True, fingerprint=None)
    assert passed(reader, [chunk + DONE]) == chunk + DONE
    assert reader.usage() is None


def test_an_event_with_choices_and_usage_stays() -> None:
    chunk = b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":1}}\n\n'
    assert passed(usage_reader(SSE, take_out=True, fingerprint=None), [chunk]) == chunk


def test_a_report_that_was_asked_for_is_read_and_stays() -> None:
    reader = usage_reader(SSE, take_out=False, fingerprint=None)
    stream = event("a") + REPORT + DONE
    assert passed(reader, cut(stream, [3, len(stream) - 30])) == stream
    assert reader.usage() == SEEN


@pytest.mark.parametrize(
    ("last", "usage"),
    [
        (
            'event: response.completed\ndata: {"response":{"usage":{"input_tokens":3,"output_tokens":4,'
            '"input_tokens_details":{"cached_tokens":1}}}}',
            TokenUsage(prompt=3, completion=4, cached=1),
        ),
        (
            'event: message_delta\ndata: {"usage":{"input_tokens":3,"output_tokens":4}}',
            TokenUsage(prompt=3, completion=4, cached=None),
        ),
    ],
)
def test_the_other_apis_report_in_their_own_words(last: str, usage: TokenUsage) -> None:
    reader = usage_reader(SSE, take_out=False, fingerprint=None)
    passed(
        reader, [b'event: message_start\ndata: {"message":{"usage":{"input_tokens":3}}}\n\n', last.encode() + b"\n\n"]
    )
    assert reader.usage() == usage


def test_a_whole_body_is_read_at_its_end() -> None:
    body = b'{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5,"prompt_tokens_details":null}}'
    reader = usage_reader("application/json", take_out=False, fingerprint=None)
    assert passed(reader, cut(body, [10, 60])) == body
    assert reader.usage() == TokenUsage(prompt=7, completion=5, cached=None)


@pytest.mark.parametrize(
    "body", [b'{"usage":{', b'{"usage":{"prompt_tokens":-1}}', b'{"usage":{"prompt_tokens":true}}']
)
def test_a_body_without_a_usable_report_has_none(body: bytes) -> None:
    reader = usage_reader("application/json", take_out=False, fingerprint=None)
    assert passed(reader, [body]) == body
    assert reader.usage() is None


def test_a_huge_body_is_passed_on_and_not_kept() -> None:
    reader = usage_reader("application/json", take_out=False, fingerprint=None)
    piece = b"x" * 300_000
    assert [reader.feed(piece) is piece for _ in range(5)] == [True] * 5
    assert reader.usage() is None
