"""Messages to ZeroMQ frames and back.

A message is one MessagePack array `[kind, fields...]` in one frame; a `Batch` may be followed by the payloads that
were too long to ride in their entry, one frame each, in order. Decoding checks every type and range. Unknown kinds
and trailing fields are ignored, so that an old and a new end can talk. All limits stand at the top of this file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

import msgpack

from xim_protocol.errors import MalformedMessage, MessageTooLarge
from xim_protocol.messages import (
    USAGE_SOURCES,
    AgentState,
    Assign,
    Assignment,
    Attach,
    Attached,
    Batch,
    Body,
    Cancel,
    CancelReason,
    Counted,
    Credit,
    Draining,
    Entry,
    EntryKind,
    Expired,
    FailCode,
    FlowControl,
    Goodbye,
    GoodbyeCode,
    Hello,
    Members,
    Message,
    RefusalReason,
    Renew,
    Renewed,
    RouterMember,
    Slots,
    StreamReport,
    StreamVerdict,
    Submit,
    Verdict,
    Welcome,
)

MAX_FRAME_BYTES = 2 * 1024 * 1024
"""Nothing larger is ever one message, whatever its frames; the sockets' MAXMSGSIZE is the same."""
MAX_FRAMES = 512
"""Frames of one message: a header and the long payloads of a batch."""
MAX_ENTRIES = 4096
"""Entries of one batch."""
INLINE_BODY_BYTES = 65_536
"""A request body up to this rides in its Submit."""
INLINE_PAYLOAD_BYTES = 4_096
"""A payload up to this rides in its entry; a longer one follows as a frame of its own."""
MAX_STREAMS = 8_192
"""Streams of one session that a Hello, Welcome or Credit may name."""
MAX_OFFSET = 2**53
MAX_STREAM_ID = 2**48
MAX_CAPACITY = 65_536
MAX_DURATION_MS = 7 * 24 * 3600 * 1000
MAX_FLOW_BYTES = 2**30
MAX_TEXT = 1_024

Frames = list[bytes]
Check = Callable[[object], Any]
Pack = Callable[[Any], object]


def _wrong(expected: str, value: object) -> NoReturn:
    raise MalformedMessage(f"expected {expected}, got {type(value).__name__}")


@dataclass(frozen=True, slots=True)
class Shape:
    """How one field looks on the wire: `check` takes the decoded value, `pack` makes it."""

    check: Check
    pack: Pack
    form: str
    """Which of the functions below made it; with `parts`, what the reference page and the tests read."""
    parts: tuple[Any, ...] = ()
    """The arguments of that function."""


def _same(value: object) -> object:
    return value


def uint(limit: int, least: int = 0) -> Shape:
    """An integer from `least` to `limit`."""

    def check(value: object) -> int:
        # bool is an int to Python, but true is no number on this wire.
        if type(value) is not int or not least <= value <= limit:
            _wrong(f"an integer {least}..{limit}", value)
        return value

    return Shape(check, _same, "uint", (least, limit))


def text(limit: int = MAX_TEXT) -> Shape:
    """A string of at most `limit` characters."""

    def check(value: object) -> str:
        if type(value) is not str or len(value) > limit:
            _wrong(f"text up to {limit} characters", value)
        return value

    return Shape(check, _same, "text", (limit,))


def raw(limit: int, least: int = 0) -> Shape:
    """Bytes, `least` to `limit` of them."""

    def check(value: object) -> bytes:
        if type(value) is not bytes or not least <= len(value) <= limit:
            _wrong(f"{least} to {limit} bytes", value)
        return value

    return Shape(check, _same, "raw", (least, limit))


def _check_flag(value: object) -> bool:
    if type(value) is not bool:
        _wrong("a boolean", value)
    return value


FLAG = Shape(_check_flag, _same, "flag")


def number(least: float, limit: float) -> Shape:
    """A finite float or integer from `least` to `limit`."""

    def check(value: object) -> float:
        # The comparison is false for NaN.
        if type(value) not in (int, float) or not least <= value <= limit:  # type: ignore[operator]
            _wrong(f"a number {least}..{limit}", value)
        return float(value)  # type: ignore[arg-type]

    return Shape(check, _same, "number", (least, limit))


def word(kind: type[StrEnum]) -> Shape:
    """One value of a closed set, by its word."""
    known = {member.value: member for member in kind}

    def check(value: object) -> StrEnum:
        found = known.get(value) if type(value) is str else None
        if found is None:
            _wrong(f"a word of {kind.__name__}", value)
        return found

    return Shape(check, lambda member: member.value, "word", (kind,))


def _check_verdict(value: object) -> Verdict:
    if type(value) is not int or value not in (0, 1, 2):
        _wrong("a verdict", value)
    return Verdict(value)


VERDICT = Shape(_check_verdict, int, "verdict")


def one_of(*words: str) -> Shape:
    """One of `words`."""

    def check(value: object) -> str:
        if type(value) is not str or value not in words:
            _wrong(f"one of {', '.join(words)}", value)
        return value

    return Shape(check, _same, "one_of", words)


def optional(shape: Shape) -> Shape:
    """`shape`, or nil."""
    return Shape(
        lambda value: None if value is None else shape.check(value),
        lambda value: None if value is None else shape.pack(value),
        "optional",
        (shape,),
    )


# Tuples are made of lists below, not of generators: such a tuple begins with ten places and is cut to size at its end,
# so the interpreter takes it from one free list and puts it into another, which fills up to 2,000 of each length.


def many(shape: Shape, limit: int) -> Shape:
    """An array of at most `limit` of `shape`."""

    def check(value: object) -> tuple[Any, ...]:
        if type(value) is not tuple:
            _wrong("an array", value)
        if len(value) > limit:
            raise MessageTooLarge("array", len(value), limit)
        return tuple([shape.check(item) for item in value])

    return Shape(check, lambda values: tuple([shape.pack(item) for item in values]), "many", (shape, limit))


def fields(*shapes: Shape) -> Shape:
    """A tuple with one value for each of `shapes`; more are ignored."""

    def check(value: object) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) < len(shapes):
            _wrong(f"an array of {len(shapes)}", value)
        return tuple([shape.check(item) for shape, item in zip(shapes, value, strict=False)])

    def pack(values: Any) -> tuple[object, ...]:
        return tuple([shape.pack(item) for shape, item in zip(shapes, values, strict=True)])

    return Shape(check, pack, "fields", shapes)


def record(cls: type[Any], **shapes: Shape) -> Shape:
    """A dataclass as an array of the named fields, in this order."""
    names = tuple(shapes)
    row = fields(*shapes.values())
    return Shape(
        lambda value: cls(**dict(zip(names, row.check(value), strict=True))),
        lambda item: row.pack([getattr(item, name) for name in names]),
        "record",
        (cls, shapes),
    )


STREAM = uint(MAX_STREAM_ID)
OFFSET = uint(MAX_OFFSET)
DURATION_MS = uint(MAX_DURATION_MS)
NAME = text(256)
PAIRS = many(fields(text(64), text(MAX_TEXT)), 64)
KEY = raw(32, least=32)
CAPACITY = uint(MAX_CAPACITY)

FLOW = record(
    FlowControl,
    enabled=FLAG,
    window_bytes=uint(MAX_FLOW_BYTES, least=1),
    replenish_threshold=number(0.0, 1.0),
    pause_threshold_bytes=uint(MAX_FLOW_BYTES, least=1),
    stall_timeout_ms=uint(MAX_DURATION_MS, least=1),
)
ASSIGNMENT = record(
    Assignment,
    endpoint=text(64),
    served_name=NAME,
    model=NAME,
    task_mode=text(32),
    quantization=optional(text(64)),
)
MEMBER = record(RouterMember, control_address=NAME, streaming_address=NAME, curve_public_key=KEY)
REPORT = record(StreamReport, stream=STREAM, started=FLAG, sent=OFFSET, ended=FLAG)
VERDICT_ROW = record(StreamVerdict, stream=STREAM, verdict=VERDICT, started=FLAG, received=OFFSET, limit=OFFSET)
USAGE = fields(uint(MAX_OFFSET), uint(MAX_OFFSET), uint(MAX_OFFSET), one_of(*USAGE_SOURCES))

KINDS: dict[int, tuple[type[Any], Shape]] = {
    1: (
        Hello,
        record(
            Hello,
            versions=many(uint(65_535, least=1), 16),
            instance=text(64),
            agent_version=text(64),
            capacity=CAPACITY,
            state=word(AgentState),
            served_model=optional(NAME),
            accelerator=PAIRS,
            lease_ms=DURATION_MS,
            renewal_interval_ms=DURATION_MS,
            flow=FLOW,
            streaming_socket=FLAG,
            streams=many(REPORT, MAX_STREAMS),
        ),
    ),
    2: (
        Renew,
        record(
            Renew,
            state=word(AgentState),
            capacity=CAPACITY,
            in_flight=CAPACITY,
            served_model=optional(NAME),
            statistics=many(fields(text(64), number(-1e15, 1e15)), 64),
        ),
    ),
    3: (Slots, record(Slots, free=CAPACITY)),
    4: (Draining, record(Draining)),
    5: (Goodbye, record(Goodbye, code=word(GoodbyeCode), message=text())),
    6: (Counted, record(Counted, request=text(64), attempt=uint(255, least=1), usage=USAGE)),
    10: (
        Welcome,
        record(
            Welcome,
            version=uint(65_535, least=1),
            session=text(64),
            lease_ms=DURATION_MS,
            flow=FLOW,
            assignment=optional(ASSIGNMENT),
            routers=many(MEMBER, 256),
            streams=many(VERDICT_ROW, 2 * MAX_STREAMS),
        ),
    ),
    11: (Renewed, record(Renewed, lease_ms=DURATION_MS)),
    12: (Expired, record(Expired)),
    13: (Assign, record(Assign, assignment=optional(ASSIGNMENT))),
    14: (
        Submit,
        record(
            Submit,
            stream=STREAM,
            request=text(64),
            attempt=uint(255, least=1),
            project=text(128),
            path=NAME,
            body=optional(raw(INLINE_BODY_BYTES)),
            body_bytes=OFFSET,
            method=text(16),
            headers=many(fields(text(64), text(8_192)), 32),
            time_left_ms=optional(DURATION_MS),
            traceparent=optional(text(128)),
        ),
    ),
    15: (Cancel, record(Cancel, stream=STREAM, reason=word(CancelReason))),
    16: (
        Credit,
        record(
            Credit,
            received=OFFSET,
            limits=many(fields(STREAM, OFFSET), MAX_STREAMS),
            closed=many(STREAM, 2 * MAX_STREAMS),
        ),
    ),
    17: (Members, record(Members, routers=many(MEMBER, 256))),
    20: (Attach, record(Attach, session=text(64))),
    21: (Attached, record(Attached, session=text(64))),
    22: (Body, record(Body, stream=STREAM, offset=OFFSET, payload=raw(INLINE_BODY_BYTES, least=1))),
}
BATCH_KIND = 23

_KIND_OF: dict[type[Any], tuple[int, Shape]] = {cls: (kind, shape) for kind, (cls, shape) in KINDS.items()}

# One for all: `packb` makes a packer for each message, whose 256 KiB tear holes into the heap. Nothing that it packs
# runs Python code in between, and its buffer never holds more than twice the longest message.
_pack: Callable[[object], bytes] = msgpack.Packer().pack


def encode(message: Message) -> Frames:
    """Frames of `message`, ready to be sent as one ZeroMQ message."""
    if type(message) is Batch:
        return encode_batch(message.entries)
    kind, shape = _KIND_OF[type(message)]
    fields_out: Any = shape.pack(message)
    return [_pack((kind, *fields_out))]


def encode_batch(entries: Sequence[Entry]) -> Frames:
    """Frames of a Batch of `entries`; payloads over `INLINE_PAYLOAD_BYTES` follow the header as frames."""
    long: Frames = []
    rows: list[Entry] = []
    for entry in entries:
        if entry[0] == EntryKind.CHUNK:
            payload: Any = entry[3]
            if len(payload) > INLINE_PAYLOAD_BYTES:
                long.append(payload)
                entry = (EntryKind.CHUNK, entry[1], entry[2], None)
        rows.append(entry)
    return [_pack((BATCH_KIND, rows)), *long]


def decode(frames: Sequence[bytes]) -> Message | None:
    """The message that `frames` hold, or None for a kind this version does not know.

    Raises:
        MessageTooLarge: more frames or bytes than the limits allow.
        MalformedMessage: anything else that is not a valid message.
    """
    check_sizes(frames)
    if not frames:
        raise MalformedMessage("a message without frames")
    row = _unpack(frames[0])
    if type(row) is not tuple or not row or type(row[0]) is not int:
        raise MalformedMessage("expected an array that begins with a kind")
    if row[0] == BATCH_KIND:
        return Batch(entries=_check_entries(row, frames))
    known = KINDS.get(row[0])
    if known is None:
        return None
    if len(frames) != 1:
        raise MalformedMessage(f"{known[0].__name__} has one frame, got {len(frames)}")
    message: Message = known[1].check(row[1:])
    return message


def check_sizes(frames: Sequence[bytes]) -> None:
    """Raise `MessageTooLarge` when `frames` are too many or too long together."""
    if len(frames) > MAX_FRAMES:
        raise MessageTooLarge("frames", len(frames), MAX_FRAMES)
    size = sum(map(len, frames))
    if size > MAX_FRAME_BYTES:
        raise MessageTooLarge("message", size, MAX_FRAME_BYTES)


def _unpack(frame: bytes) -> object:
    try:
        return msgpack.unpackb(
            frame,
            use_list=False,
            strict_map_key=True,
            max_bin_len=MAX_FRAME_BYTES,
            max_str_len=MAX_TEXT * 64,
            # An array's memory is taken when its header is read: never more places than there are bytes.
            max_array_len=min(len(frame), 2 * MAX_STREAMS),
            max_map_len=0,
            max_ext_len=0,
        )
    # msgpack's own errors derive from ValueError, the one of deep nesting and that of broken UTF-8 too.
    except (ValueError, TypeError) as error:
        raise MalformedMessage(f"not MessagePack within the limits ({type(error).__name__})") from None


# --- Entries of a batch: the hot path ------------------------------------------------------------------------------


def _check_entries(row: tuple[object, ...], frames: Sequence[bytes]) -> tuple[Entry, ...]:
    entries = row[1] if len(row) > 1 else None
    if type(entries) is not tuple:
        raise MalformedMessage("expected an array of entries")
    if len(entries) > MAX_ENTRIES:
        raise MessageTooLarge("entries", len(entries), MAX_ENTRIES)
    checked: list[Entry] = []
    next_frame = 1
    for entry in entries:
        # Chunks are nearly all entries: checked in line, everything else by the table below.
        if type(entry) is not tuple or len(entry) < 2 or type(entry[0]) is not int:
            raise MalformedMessage("expected an entry of a kind and a stream")
        if entry[0] == 1 and len(entry) >= 4:
            _, stream, offset, payload = entry[:4]
            if payload is None:
                if next_frame >= len(frames):
                    raise MalformedMessage("a chunk's frame is missing")
                payload = frames[next_frame]
                next_frame += 1
                entry = (1, stream, offset, payload)
            if (
                type(payload) is not bytes
                or not payload
                or type(stream) is not int
                or not 0 <= stream <= MAX_STREAM_ID
                or type(offset) is not int
                or not 0 <= offset <= MAX_OFFSET
            ):
                raise MalformedMessage("a chunk needs stream, offset and bytes")
            checked.append(entry)
        else:
            known = ENTRY_SHAPES.get(entry[0])
            if known is not None:
                checked.append((entry[0], *known.check(entry[1:])))
    if next_frame != len(frames):
        raise MalformedMessage("more frames than chunks that need one")
    return tuple(checked)


ENTRY_SHAPES: dict[int, Shape] = {
    0: fields(STREAM, uint(999, least=100), text(256)),
    1: fields(STREAM, OFFSET, raw(MAX_FRAME_BYTES, least=1)),
    2: fields(STREAM, OFFSET, optional(USAGE)),
    3: fields(STREAM, word(FailCode), text(), FLAG, optional(USAGE)),
    4: fields(STREAM, word(RefusalReason), CAPACITY),
    5: fields(STREAM, OFFSET),
}
