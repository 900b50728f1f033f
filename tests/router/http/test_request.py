"""Reading the head and the body of a request."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive

from xim_router.http.errors import ApiError
from xim_router.http.request import (
    Disconnected,
    RequestHead,
    check_content_type,
    client_request_id,
    read_body,
    read_head,
)


def refusal(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_head(body)
    return caught.value


def test_the_head_is_found_among_fields_of_any_kind() -> None:
    body = (
        b'{"messages": [{"role": "user", "content": "\xc3\xbc"}], "model": "chat", "n": 1e3, "stream": true, "x": null}'
    )
    assert read_head(body) == RequestHead(model="chat", stream=True, continues_response=False)


def test_what_is_absent_or_null_is_none_and_false() -> None:
    empty = RequestHead(model=None, stream=False, continues_response=False)
    assert read_head(b"{}") == empty
    assert read_head(b'{"model": null, "stream": null, "previous_response_id": null}') == empty


def test_an_answer_that_goes_on_from_another_is_told() -> None:
    assert read_head(b'{"previous_response_id": "resp_1"}').continues_response


def test_of_equal_keys_the_last_wins_as_in_the_engine() -> None:
    assert read_head(b'{"model": "a", "model": "b"}').model == "b"


@pytest.mark.parametrize("value", ["true", "1", '"true"', '"Yes"', "1.0"])
def test_streams_what_the_engine_streams(value: str) -> None:
    assert read_head(f'{{"stream": {value}}}'.encode()).stream


@pytest.mark.parametrize("value", ["false", "0", '"no"', "2", "[true]", '"maybe"', "{}", "1e999"])
def test_what_does_not_stream_or_is_nonsense_is_left_to_the_engine(value: str) -> None:
    assert not read_head(f'{{"stream": {value}}}'.encode()).stream


@pytest.mark.parametrize(
    "body",
    [b"", b" \r\n", b"hello", b'{"model": "a"', b'{"a": 1} b', b"\xff\xfe", b'{"model": "\xff"}', b'{"a": NaN}'],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    error = refusal(body)
    assert (error.code, error.rule.status) == ("invalid_body", 400)


def test_json_that_is_nested_without_end_is_refused() -> None:
    assert refusal(b'{"a":' + b"[" * 100_000).code == "invalid_body"


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"model"', b"[{}]"])
def test_json_that_is_no_object_is_refused_as_such(body: bytes) -> None:
    error = refusal(body)
    assert error.code == "invalid_body"
    assert "object" in error.message


@pytest.mark.parametrize("value", [b"5", b"true", b"[]", b"{}", b'["chat"]'])
def test_a_model_that_is_no_string_is_refused_by_name(value: bytes) -> None:
    error = refusal(b'{"model": ' + value + b"}")
    assert (error.code, error.param, error.rule.status) == ("invalid_request", "model", 400)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_an_error(body: bytes) -> None:
    try:
        head = read_head(body)
    except ApiError as error:
        status = error.rule.status
    else:
        status = 200 if isinstance(head, RequestHead) else 0
    assert status in (200, 400)


@pytest.mark.parametrize(
    "content_type", [None, b"application/json", b"application/json; charset=utf-8", b"Application/JSON ;x=y"]
)
def test_json_and_an_unnamed_type_are_taken(content_type: bytes | None) -> None:
    check_content_type(content_type)


@pytest.mark.parametrize("content_type", [b"", b"text/plain", b"application/jsonl", b"multipart/form-data; boundary=x"])
def test_another_content_type_is_refused(content_type: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        check_content_type(content_type)
    assert (caught.value.code, caught.value.rule.status) == ("unsupported_media_type", 415)


# Bodies


class Client:
    """The server's end of a connection: gives the messages one by one, and counts what was asked for."""

    def __init__(self, messages: Iterable[Message]) -> None:
        self._messages = iter(messages)
        self.asked = 0

    async def receive(self) -> Message:
        self.asked += 1
        return next(self._messages)


def body_in(*pieces: bytes) -> list[Message]:
    last = len(pieces) - 1
    return [{"type": "http.request", "body": piece, "more_body": n < last} for n, piece in enumerate(pieces)]


async def test_a_body_in_pieces_is_joined() -> None:
    receive: Receive = Client(body_in(b"ab", b"", b"c")).receive
    assert await read_body(receive, 3) == b"abc"


async def test_a_message_without_fields_is_an_empty_body() -> None:
    assert await read_body(Client([{"type": "http.request"}]).receive, 3) == b""


async def test_a_client_that_leaves_is_told_from_an_empty_body() -> None:
    client = Client([*body_in(b"ab", b"c")[:1], {"type": "http.disconnect"}])
    assert isinstance(await read_body(client.receive, 3), Disconnected)


async def test_a_body_that_announces_too_much_is_refused_unread() -> None:
    client = Client(body_in(b"abcd"))
    with pytest.raises(ApiError) as caught:
        await read_body(client.receive, 3, [(b"content-length", b"4")])
    assert (caught.value.code, caught.value.rule.status) == ("body_too_large", 413)
    assert client.asked == 0


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"3")], [(b"content-length", b"three")]])
async def test_a_body_that_becomes_too_much_is_refused_at_once(headers: list[tuple[bytes, bytes]]) -> None:
    client = Client(body_in(b"ab", b"cd", b"ef"))
    with pytest.raises(ApiError) as caught:
        await read_body(client.receive, 3, headers)
    assert caught.value.code == "body_too_large"
    assert client.asked == 2


def test_a_well_formed_request_id_is_kept_and_any_other_is_not() -> None:
    assert client_request_id([(b"host", b"x"), (b"x-request-id", b"abc-1.2_3:4")]) == "abc-1.2_3:4"
    for value in (b"", b"two words", b"x" * 129, b"line\nbreak", b"\xc3\xbc"):
        assert client_request_id([(b"x-request-id", value)]) is None
    assert client_request_id([]) is None
