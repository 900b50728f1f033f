"""The wire's bytes: golden files, limits, and what is ignored."""

import tracemalloc
from collections.abc import Callable

import msgpack
import pytest

from tests.protocol.golden_messages import FOLDER, GOLDEN, frames_in, hexdump
from xim_protocol import codec
from xim_protocol.codec import BATCH_KIND, ENTRY_SHAPES, KINDS, check_sizes, decode, encode
from xim_protocol.errors import FaultReason, MalformedMessage, MessageTooLarge, RemoteProtocolError
from xim_protocol.messages import Attach, Batch, Body, Credit, Draining, EntryKind, Message, Renewed, Slots

RENEW_ROW = [2, "ready", 8, 3, None, []]
WELCOME_FLOW = [True, 65_536, 0.5, 262_144, 30_000]


def packed(*row: object) -> list[bytes]:
    return [msgpack.packb(row)]


# --- Golden bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_a_message_has_its_golden_bytes(name: str) -> None:
    assert hexdump(GOLDEN[name]) == (FOLDER / f"{name}.hex").read_text()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_give_the_message_back(name: str) -> None:
    assert decode(frames_in((FOLDER / f"{name}.hex").read_text())) == GOLDEN[name]


def test_every_golden_file_belongs_to_an_example() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(GOLDEN)


def test_every_kind_of_message_has_golden_bytes() -> None:
    assert {type(message) for message in GOLDEN.values()} == {cls for cls, _ in KINDS.values()} | {Batch}


def test_every_kind_of_entry_has_golden_bytes_of_its_own() -> None:
    single = [m.entries[0][0] for m in GOLDEN.values() if isinstance(m, Batch) and len(m.entries) == 1]
    assert sorted(single, key=str) == sorted(ENTRY_SHAPES, key=str) == sorted(EntryKind)


def test_batches_have_a_kind_of_their_own() -> None:
    assert BATCH_KIND not in KINDS


def test_a_long_payload_leaves_its_entry_and_follows_as_a_frame() -> None:
    entries = ((EntryKind.CHUNK, 7, 0, b"x" * 4_097), (EntryKind.CHUNK, 8, 0, b"y"))
    header, payload = encode(Batch(entries=entries))
    assert (msgpack.unpackb(header), payload) == ([23, [[1, 7, 0, None], [1, 8, 0, b"y"]]], b"x" * 4_097)


# --- Old and new ends talk ------------------------------------------------------------------------------------------


def test_an_unknown_kind_is_ignored() -> None:
    assert decode(packed(99, "from", "a", "later", "version")) is None


def test_an_unknown_kind_may_have_frames_of_its_own() -> None:
    assert decode([*packed(99), b"more"]) is None


def test_trailing_fields_of_a_message_are_ignored() -> None:
    assert decode(packed(3, 2, "new")) == Slots(free=2)


def test_trailing_fields_of_a_batch_are_ignored() -> None:
    assert decode(packed(23, [[5, 7, 9]], "new")) == Batch(entries=((EntryKind.CONTINUE, 7, 9),))


def test_trailing_fields_of_an_entry_are_ignored() -> None:
    assert decode(packed(23, [[2, 7, 9, None, "new"]])) == Batch(entries=((EntryKind.END, 7, 9, None),))


def test_trailing_fields_of_a_nested_row_are_ignored() -> None:
    assert decode(packed(16, 5, [[7, 9, "new"]], [])) == Credit(received=5, limits=((7, 9),))  # type: ignore[arg-type]


def test_an_unknown_kind_of_entry_is_ignored_and_the_others_are_kept() -> None:
    assert decode(packed(23, [[77, 7, "new"], [5, 7, 9]])) == Batch(entries=((EntryKind.CONTINUE, 7, 9),))


# --- What is no message ---------------------------------------------------------------------------------------------

NO_MESSAGE: dict[str, list[bytes]] = {
    "no frame at all": [],
    "an empty frame": [b""],
    "half a message": [encode(Renewed(lease_ms=30_000))[0][:-1]],
    "bytes after the message": [encode(Draining())[0] + b"\x00"],
    "a byte that MessagePack never uses": [b"\xc1"],
    "text that is not UTF-8": [b"\x92\x14\xa1\xff"],
    "no array": [msgpack.packb(5)],
    "an empty array": [b"\x90"],
    "a map": [b"\x80"],
    "a map with a key": [b"\x91\x81\x01\x02"],
    "an extension type": [b"\x91\xd4\x05\x00"],
    "a timestamp": [b"\x92\x03\xd6\xff\x00\x00\x00\x00"],
    "a kind that is a boolean": packed(True, 2),
    "a kind that is text": packed("hello"),
    "a missing field": packed(3),
    "a boolean for a number": packed(3, True),
    "a float for an integer": packed(3, 2.0),
    "a number below its range": packed(3, -1),
    "a number above its range": packed(3, codec.MAX_CAPACITY + 1),
    "an integer beyond 64 bits of sign": packed(3, 2**64 - 1),
    "a number for a boolean": packed(13, ["e", "n", "m", "generate", 5]),
    "text beyond its limit": packed(20, "s" * 65),
    "bytes for text": packed(20, b"s"),
    "text for bytes": packed(22, 7, 0, "payload"),
    "bytes below their least": packed(22, 7, 0, b""),
    "bytes beyond their limit": packed(22, 7, 0, bytes(codec.INLINE_BODY_BYTES + 1)),
    "a word of no closed set": packed(5, "whatever", ""),
    "a number for a word": packed(5, 1, ""),
    "a statistic that is no number": packed(*RENEW_ROW[:5], [["x", "1"]]),
    "a statistic that is not finite": packed(*RENEW_ROW[:5], [["x", float("inf")]]),
    "a statistic that is NaN": packed(*RENEW_ROW[:5], [["x", float("nan")]]),
    "an array for a row": packed(16, 5, [7], []),
    "a row that is too short": packed(16, 5, [[7]], []),
    "text for an array": packed(16, 5, "limits", []),
    "a flag that is no boolean": packed(10, 1, "s", 1, [1, *WELCOME_FLOW[1:]], None, [], []),
    "a verdict of no meaning": packed(10, 1, "s", 1, WELCOME_FLOW, None, [], [[7, 3, False, 0, 0]]),
    "a verdict that is a boolean": packed(10, 1, "s", 1, WELCOME_FLOW, None, [], [[7, True, False, 0, 0]]),
    "a key of the wrong length": packed(10, 1, "s", 1, WELCOME_FLOW, None, [["a", "b", bytes(31)]], []),
    "a second frame where one belongs": [*encode(Draining()), b"x"],
    "a batch without entries": packed(23),
    "a batch whose entries are no array": packed(23, 5),
    "an entry that is no array": packed(23, [5]),
    "an entry without a stream": packed(23, [[1]]),
    "an entry whose kind is a boolean": packed(23, [[True, 7, 0, b"x"]]),
    "a chunk without its payload's place": packed(23, [[1, 7, 0]]),
    "a chunk whose frame is missing": packed(23, [[1, 7, 0, None]]),
    "a chunk with an empty payload": packed(23, [[1, 7, 0, b""]]),
    "a chunk whose frame is empty": [*packed(23, [[1, 7, 0, None]]), b""],
    "a chunk of text": packed(23, [[1, 7, 0, "x"]]),
    "a chunk with a negative stream": packed(23, [[1, -1, 0, b"x"]]),
    "a chunk whose stream is a boolean": packed(23, [[1, True, 0, b"x"]]),
    "a chunk with a negative offset": packed(23, [[1, 7, -1, b"x"]]),
    "a chunk whose offset is text": packed(23, [[1, 7, "0", b"x"]]),
    "a chunk beyond the greatest offset": packed(23, [[1, 7, codec.MAX_OFFSET + 1, b"x"]]),
    "a frame that no chunk needs": [*packed(23, [[1, 7, 0, b"x"]]), b"y"],
    "a status that is none": packed(23, [[0, 7, 99, "text/plain"]]),
    "tokens that nobody counted": packed(23, [[2, 7, 9, [1, 1, 0, "guessed"]]]),
    "tokens counted by a number": packed(23, [[2, 7, 9, [1, 1, 0, 1]]]),
}


@pytest.mark.parametrize("name", NO_MESSAGE)
def test_what_is_no_message_is_malformed(name: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        decode(NO_MESSAGE[name])
    assert caught.value.reason is FaultReason.MALFORMED


def test_the_error_says_what_was_expected_and_holds_nothing_of_the_peer() -> None:
    with pytest.raises(MalformedMessage, match=r"^expected text up to 64 characters, got bytes$"):
        decode(packed(20, b"secret"))


@pytest.mark.parametrize("opening", [b"\x91", b"\xdc\x00\x01", b"\x81\x01", b"\x92\x01\x91"])
def test_deep_nesting_is_malformed(opening: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode([opening * 100_000 + b"\x01"])


# --- Limits ---------------------------------------------------------------------------------------------------------

TOO_LARGE: dict[str, Callable[[], list[bytes]]] = {
    "a frame": lambda: [bytes(codec.MAX_FRAME_BYTES + 1)],
    "frames together": lambda: [bytes(codec.MAX_FRAME_BYTES // 2), bytes(codec.MAX_FRAME_BYTES // 2), b"x"],
    "the number of frames": lambda: [b""] * (codec.MAX_FRAMES + 1),
    "the number of entries": lambda: packed(23, [[5, 1, 1]] * (codec.MAX_ENTRIES + 1)),
    "an array": lambda: packed(16, 0, [[1, 1]] * (codec.MAX_STREAMS + 1), []),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_over_a_limit_is_too_large(name: str) -> None:
    with pytest.raises(MessageTooLarge) as caught:
        decode(TOO_LARGE[name]())
    assert caught.value.reason is FaultReason.TOO_LARGE
    assert caught.value.size == caught.value.limit + 1


AT_THE_LIMIT: dict[str, Message] = {
    "a piece of a body": Body(stream=7, offset=codec.MAX_OFFSET, payload=bytes(codec.INLINE_BODY_BYTES)),  # type: ignore[arg-type]
    "streams in a credit": Credit(received=0, limits=((codec.MAX_STREAM_ID, 1),) * codec.MAX_STREAMS),  # type: ignore[arg-type]
    "closed streams in a credit": Credit(received=0, closed=(codec.MAX_STREAM_ID,) * 2 * codec.MAX_STREAMS),  # type: ignore[arg-type]
    "text": Attach(session="é" * 64),  # type: ignore[arg-type]
    "entries": Batch(entries=((EntryKind.CONTINUE, 1, 1),) * codec.MAX_ENTRIES),
    "frames": Batch(entries=((EntryKind.CHUNK, 1, 1, b"x" * 4_097),) * (codec.MAX_FRAMES - 1)),
}


@pytest.mark.parametrize("name", AT_THE_LIMIT)
def test_what_is_just_at_its_limit_is_a_message(name: str) -> None:
    assert decode(encode(AT_THE_LIMIT[name])) == AT_THE_LIMIT[name]


def test_sizes_at_their_limits_pass() -> None:
    check_sizes([bytes(codec.MAX_FRAME_BYTES)])
    check_sizes([b""] * codec.MAX_FRAMES)


@pytest.mark.parametrize(
    "frame",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 4 Gi
        b"\xdf\xff\xff\xff\xff",  # a map of 4 Gi
        b"\xc6\xff\xff\xff\xff",  # bytes of 4 GiB
        b"\xdb\xff\xff\xff\xff",  # text of 4 GiB
        b"\xc9\xff\xff\xff\xff\x05",  # an extension of 4 GiB
        b"\xdc\x40\x00" * 600,  # arrays of 16,384 in each other
    ],
)
def test_a_small_frame_that_promises_much_takes_little_memory(frame: bytes) -> None:
    assert refused_with_peak_bytes(frame) < 64 * 1024


def test_arrays_in_each_other_take_no_more_than_the_depth_allows() -> None:
    # MessagePack's reader stops at 1,024 levels; each level has at most 16,384 places of 8 bytes.
    deep = b"\xdc\x40\x00" * (codec.MAX_FRAME_BYTES // 3)
    assert refused_with_peak_bytes(deep) < 1_024 * 16_384 * 8


def refused_with_peak_bytes(frame: bytes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode([frame])
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
