"""Hypothesis strategies for every message, made from the shapes of the codec's own table.

A field that is added to a shape is drawn from here on without a change in any test.
"""

from typing import Any

from hypothesis import strategies as st

from xim_protocol.codec import ENTRY_SHAPES, INLINE_PAYLOAD_BYTES, KINDS, MAX_OFFSET, MAX_STREAM_ID, Shape
from xim_protocol.messages import Batch, EntryKind, Message, Verdict

MOST = 4
"""Elements of a drawn array; the limits themselves are tested by example."""
PAYLOADS = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.sampled_from([INLINE_PAYLOAD_BYTES, INLINE_PAYLOAD_BYTES + 1, 3 * INLINE_PAYLOAD_BYTES]).map(bytes),
)


def values_of(shape: Shape) -> st.SearchStrategy[Any]:
    """Values that `shape` takes, as they stand in a message."""
    match shape.form, shape.parts:
        case "uint", (least, limit):
            return st.integers(least, limit)
        case "number", (least, limit):
            return st.floats(least, limit)
        case "text", (limit,):
            return st.text(max_size=min(limit, 20))
        case "raw", (least, limit):
            return st.binary(min_size=least, max_size=max(least, min(limit, 40)))
        case "flag", _:
            return st.booleans()
        case "word", (kind,):
            return st.sampled_from(list(kind))
        case "verdict", _:
            return st.sampled_from(list(Verdict))
        case "one_of", words:
            return st.sampled_from(words)
        case _:
            return _composed(shape)


def _composed(shape: Shape) -> st.SearchStrategy[Any]:
    match shape.form, shape.parts:
        case "optional", (inner,):
            return st.none() | values_of(inner)
        case "many", (inner, _):
            return st.lists(values_of(inner), max_size=MOST).map(tuple)
        case "fields", inner:
            return st.tuples(*map(values_of, inner))
        case "record", (cls, inner):
            return st.builds(cls, **{name: values_of(field) for name, field in inner.items()})
        case form, _:
            raise NotImplementedError(f"no strategy for the form {form}")


def _entries_of(kind: int, shape: Shape) -> st.SearchStrategy[tuple[object, ...]]:
    if kind == EntryKind.CHUNK:
        return st.tuples(st.just(kind), st.integers(0, MAX_STREAM_ID), st.integers(0, MAX_OFFSET), PAYLOADS)
    return values_of(shape).map(lambda row: (kind, *row))


ENTRIES: st.SearchStrategy[tuple[object, ...]] = st.one_of(*(_entries_of(*item) for item in ENTRY_SHAPES.items()))
BATCHES: st.SearchStrategy[Message] = st.builds(Batch, entries=st.lists(ENTRIES, max_size=8).map(tuple))
MESSAGES: st.SearchStrategy[Message] = st.one_of(BATCHES, *(values_of(shape) for _, shape in KINDS.values()))
