"""Stall clocks: what a stream waited for credit counts, the time without a link does not."""

from xim_protocol.ids import StreamId
from xim_protocol.stall import StallClocks

ONE, TWO = StreamId(1), StreamId(2)


def test_a_stream_waits_since_it_had_no_credit_first() -> None:
    clocks = StallClocks()
    clocks.start(ONE, 1.0)
    clocks.start(TWO, 4.0)
    clocks.start(ONE, 5.0)
    assert clocks.oldest() == 1.0
    assert (clocks.late(10.9, 10.0), clocks.late(11.0, 10.0), clocks.late(14.0, 10.0)) == ([], [ONE], [ONE, TWO])
    clocks.stop(ONE)
    assert clocks.oldest() == 4.0


def test_every_outage_is_left_out() -> None:
    clocks = StallClocks()
    clocks.start(ONE, 0.0)
    clocks.stand_still(2.0)
    clocks.go_on(100.0)
    clocks.stand_still(103.0)
    clocks.go_on(200.0)
    assert clocks.late(204.9, 10.0) == []
    assert clocks.late(205.0, 10.0) == [ONE]


def test_attempts_at_a_link_that_fail_belong_to_one_outage() -> None:
    clocks = StallClocks()
    clocks.start(ONE, 0.0)
    clocks.stand_still(2.0)
    clocks.stand_still(50.0)
    clocks.go_on(100.0)
    assert clocks.oldest() == 98.0
