"""What holds for every message, and for everything that is none."""

from collections.abc import Callable

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.golden_messages import GOLDEN
from tests.protocol.strategies import MESSAGES
from xim_protocol.codec import BATCH_KIND, ENTRY_SHAPES, KINDS, decode, encode
from xim_protocol.errors import RemoteProtocolError
from xim_protocol.messages import Batch, Message

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)
ROWS = st.tuples(st.sampled_from([*KINDS, BATCH_KIND]) | st.integers(-5, 300), st.lists(VALUES, max_size=14))
ENTRY_ROWS = st.tuples(st.sampled_from(list(ENTRY_SHAPES)) | st.integers(-5, 300), st.lists(VALUES, max_size=6))
MORE_FRAMES = st.lists(st.binary(max_size=6), max_size=3)


@given(MESSAGES)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


@given(MESSAGES, st.lists(VALUES, max_size=3))
def test_whatever_a_later_version_appends_is_ignored(message: Message, more: list[object]) -> None:
    header, *payloads = encode(message)
    # Only rows that can be read at all: a map with keys or an extension is none in any version of this wire.
    longer = [msgpack.packb([*msgpack.unpackb(header, strict_map_key=False), *filter(_plain, more)]), *payloads]
    assert decode(longer) == message


def _plain(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_plain, value))
    return not isinstance(value, dict | msgpack.ExtType)


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_random_bytes_are_refused_or_read(frames: list[bytes]) -> None:
    assert_refused_or_read(frames)


@given(VALUES, MORE_FRAMES)
def test_random_values_are_refused_or_read(value: object, more: list[bytes]) -> None:
    assert_refused_or_read([msgpack.packb(value), *more])


@given(ROWS, MORE_FRAMES)
def test_known_kinds_with_random_fields_are_refused_or_read(row: tuple[int, list[object]], more: list[bytes]) -> None:
    assert_refused_or_read([msgpack.packb([row[0], *row[1]]), *more])


@given(st.lists(ENTRY_ROWS, max_size=4), MORE_FRAMES)
def test_known_entries_with_random_fields_are_refused_or_read(
    rows: list[tuple[int, list[object]]], more: list[bytes]
) -> None:
    assert_refused_or_read([msgpack.packb([BATCH_KIND, [[kind, *fields] for kind, fields in rows]]), *more])


@given(st.sampled_from(list(GOLDEN.values())), st.integers(0, 400), st.integers(1, 255))
def test_a_message_with_one_wrong_byte_is_refused_or_read(message: Message, at: int, flip: int) -> None:
    def damage(frame: bytes) -> bytes:
        place = at % len(frame)
        return frame[:place] + bytes([frame[place] ^ flip]) + frame[place + 1 :]

    assert_refused_or_read(_first_frame(message, damage))


@given(st.sampled_from(list(GOLDEN.values())), st.integers(0, 400))
def test_a_message_cut_short_is_refused(message: Message, at: int) -> None:
    frames = _first_frame(message, lambda frame: frame[: at % len(frame)])
    assert_refused_or_read(frames)


@given(st.sampled_from(list(GOLDEN.values())), st.binary(min_size=1, max_size=8))
def test_a_message_with_bytes_behind_it_is_refused_or_read(message: Message, more: bytes) -> None:
    assert_refused_or_read(_first_frame(message, lambda frame: frame + more))


def _first_frame(message: Message, change: Callable[[bytes], bytes]) -> list[bytes]:
    header, *payloads = encode(message)
    return [change(header), *payloads]


def assert_refused_or_read(frames: list[bytes]) -> None:
    """Any other exception fails the test; what was read must be writable again, and mean the same."""
    try:
        message = decode(frames)
    except RemoteProtocolError:
        return
    if message is None:
        return
    if isinstance(message, Batch):
        # Chunks keep what a later version appended.
        message = Batch(entries=tuple(entry[:4] if entry[0] == 1 else entry for entry in message.entries))
    assert decode(encode(message)) == message
