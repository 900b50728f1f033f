"""What the agent changes in a request's body: `cache_salt`, `model` and `stream_options`, and nothing else.

The body is parsed and written again rather than spliced: of a duplicate key the last one counts in vLLM, and a
client's own salt must not. Only the object itself is built; the values of its fields stay the client's own bytes, which
is a tenth of the time. Bodies over 64 KiB belong in a thread; everything here is pure.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii

import msgspec

from xim_protocol.routes import Route, TerminalEvent

THREAD_BYTES = 64 * 1024
"""Bodies longer than this take over a millisecond where `json` has to read them: they are prepared in a thread."""

Fields = dict[str, bytes | msgspec.Raw]
"""A body's fields by name, each value as JSON."""
_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_MISSING_FIELD = re.compile(rb"('loc': 'body\.[^.']+', 'msg': 'Field required', 'input': '<dict of )(\d+) items>'")
"""Of a top-level field; what is missing further down counts the fields of another object."""
_YES = frozenset({"1", "on", "t", "true", "y", "yes"})
_NO = frozenset({"0", "off", "f", "false", "n", "no"})


class BodyInvalid(Exception):
    """The body is no JSON object, so it can carry no salt and is never given to the engine. `detail` is for the
    client and repeats nothing of the body."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedBody:
    """A body for the engine."""

    body: bytes
    stream: bool
    """The client asked for an event stream."""
    take_usage_out: bool
    """The stream's usage event was not asked for by the client: it is read and not passed on."""
    sent_fields: int
    """Top-level fields of the client's body."""
    engine_fields: int
    """Top-level fields of `body`."""

    def restore_error(self, error: bytes) -> bytes:
        """The engine's body of a 400 as it would be for the client's own body.

        vLLM 0.32 says of a missing field how many fields the body has, and ours has more. It counts some of its own
        on /v1/responses, so the difference is taken off, whatever the number.
        """
        added = self.engine_fields - self.sent_fields
        return _MISSING_FIELD.sub(lambda found: b"%b%d items>'" % (found[1], int(found[2]) - added), error)


def prepare_body(body: bytes, *, route: Route, model: str, salt: Callable[[str | None], str]) -> PreparedBody:
    """The engine's body for a client's.

    `model` is the engine's one served name. `salt` gives the tenant's salt for the one the client sent; it is not
    called for a route that knows none.

    Raises:
        BodyInvalid: `body` is not a JSON object.
    """
    try:
        return _prepared(_parse(body), route=route, model=model, salt=salt)
    except RecursionError as error:  # each of the readers and the writer has a limit of its own
        raise BodyInvalid("the body is nested too deeply") from error


def _prepared(fields: Fields, *, route: Route, model: str, salt: Callable[[str | None], str]) -> PreparedBody:
    sent_fields = len(fields)
    fields["model"] = _quoted(model)
    if route.cache_salt:
        _set_salt(fields, salt)
    stream = route.terminal is not TerminalEvent.NONE and _truth(_value(fields, "stream")) is True
    take_usage_out = stream and route.stream_options and _ask_for_usage(fields)
    return PreparedBody(
        body=_written(fields),
        stream=stream,
        take_usage_out=take_usage_out,
        sent_fields=sent_fields,
        engine_fields=len(fields),
    )


def _parse(body: bytes) -> Fields:
    try:
        str(body, "utf-8", "surrogatepass")  # what stays as it is is not looked into for that
        return {**_decode(body)}
    except ValueError:
        return _parse_odd(body)


def _parse_odd(body: bytes) -> Fields:
    """What `json` knows beyond the standard, as the engine does: lone surrogates, NaN, UTF-16."""
    try:
        fields = json.loads(body)
        if isinstance(fields, dict):
            return {name: _json(value) for name, value in fields.items()}
    except ValueError as error:  # malformed, wrongly encoded, or a number of thousands of digits
        raise BodyInvalid("the body is not valid JSON") from error
    raise BodyInvalid("the body is not a JSON object")


def _json(value: object) -> bytes:
    # ASCII: a lone surrogate, legal in JSON, cannot be written in UTF-8.
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _quoted(text: str) -> bytes:
    return encode_basestring_ascii(text).encode("ascii")


def _written(fields: Fields) -> bytes:
    return b"{%b}" % b",".join([b"%b:%b" % (_quoted(name), value) for name, value in fields.items()])


def _set_salt(fields: Fields, salt: Callable[[str | None], str]) -> None:
    """Replace the client's salt by the tenant's, into which it is folded.

    An empty one and one of another type stay: vLLM 0.32 refuses both in its own words, on every route that knows
    the field, before it touches the cache.
    """
    sent = _value(fields, "cache_salt")
    if sent is None or (isinstance(sent, str) and sent):
        fields["cache_salt"] = _quoted(salt(sent))


def _ask_for_usage(fields: Fields) -> bool:
    """Have the engine report usage; True when the client did not ask for it.

    Options that vLLM refuses stay as they are, and so does an answer in its own words.
    """
    options = _value(fields, "stream_options")
    if options is None:
        fields["stream_options"] = b'{"include_usage":true}'
        return True
    if not isinstance(options, dict):
        return False
    include = options.get("include_usage")
    if include is not None and _truth(include) is not False:
        return False
    asked = {**options, "include_usage": True}
    if "continuous_usage_stats" in options:
        # Without include_usage vLLM ignores it; with ours it would put usage into every event.
        asked["continuous_usage_stats"] = False
    fields["stream_options"] = _json(asked)
    return True


def _truth(value: object) -> bool | None:
    """A boolean as vLLM reads it, which is pydantic's lax way; None for what is none.

    A client that wrote one in another word would else be given a stream whose tokens nobody counts.
    """
    if isinstance(value, str):
        word = value.lower()
        return word in _YES if word in _YES | _NO else None
    return value == 1 if isinstance(value, (int, float)) and value in (0, 1) else None


def _value(fields: Fields, name: str) -> object:
    """A field's value, None where there is none."""
    found = fields.get(name)
    try:
        return None if found is None else json.loads(bytes(found))
    except ValueError as error:  # a number of thousands of digits
        raise BodyInvalid("the body is not valid JSON") from error
