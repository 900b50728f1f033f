"""One example of every message and of every entry; `golden/` holds the bytes of each.

To add one: append it here, run `python -m tests.protocol.golden_messages`, and read the new file before committing it.
"""

from pathlib import Path

from xim_protocol.codec import encode
from xim_protocol.ids import EndpointId, InstanceId, ProjectId, RequestId, SessionId, StreamId
from xim_protocol.messages import (
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

FOLDER = Path(__file__).parent / "golden"
SEVEN = StreamId(7)
ASSIGNMENT = Assignment(
    endpoint=EndpointId("7f0c9a2e"), served_name="small", model="org/model", task_mode="generate", quantization="awq"
)

GOLDEN: dict[str, Message] = {
    "hello": Hello(
        versions=(1,),
        instance=InstanceId("i-1"),
        agent_version="0.1.0",
        capacity=8,
        state=AgentState.READY,
        served_model="small",
        accelerator=(("gpu", "none"),),
        lease_ms=30_000,
        renewal_interval_ms=10_000,
        flow=FlowControl(),
        streaming_socket=True,
        streams=(StreamReport(stream=SEVEN, started=True, sent=70_000, ended=False),),
    ),
    "renew": Renew(
        state=AgentState.DEGRADED,
        capacity=8,
        in_flight=3,
        served_model=None,
        statistics=(("num_requests_running", 3.0),),
    ),
    "slots": Slots(free=2),
    "counted": Counted(request=RequestId("req_1"), attempt=2, usage=(5, 1, 0, "counted")),
    "draining": Draining(),
    "goodbye": Goodbye(code=GoodbyeCode.SUPERSEDED, message="two"),
    "welcome": Welcome(
        version=1,
        session=SessionId("s-1"),
        lease_ms=30_000,
        flow=FlowControl(),
        assignment=ASSIGNMENT,
        routers=(RouterMember(control_address="tcp://r:1", streaming_address="tcp://r:2", curve_public_key=bytes(32)),),
        streams=(
            StreamVerdict(stream=SEVEN, verdict=Verdict.RESUME, started=True, received=65_536, limit=131_072),
            StreamVerdict(stream=StreamId(8), verdict=Verdict.SUBMIT_AGAIN),
            StreamVerdict(stream=StreamId(9), verdict=Verdict.GONE),
        ),
    ),
    "renewed": Renewed(lease_ms=30_000),
    "expired": Expired(),
    "assign": Assign(assignment=None),
    "members": Members(
        routers=(RouterMember(control_address="tcp://r:3", streaming_address="tcp://r:4", curve_public_key=bytes(32)),)
    ),
    "submit": Submit(
        stream=SEVEN,
        request=RequestId("req_1"),
        attempt=1,
        project=ProjectId("proj_a"),
        path="/v1/completions",
        body=b"{}",
        body_bytes=2,
        headers=(("accept", "*/*"),),
        time_left_ms=600_000,
        traceparent=None,
    ),
    "submit_long": Submit(
        stream=SEVEN,
        request=RequestId("req_1"),
        attempt=2,
        project=ProjectId("proj_a"),
        path="/v1/completions",
        body=None,
        body_bytes=65_537,
    ),
    "cancel": Cancel(stream=SEVEN, reason=CancelReason.CLIENT_LEFT),
    "credit": Credit(received=98_304, limits=((SEVEN, 131_072),), closed=(StreamId(5), StreamId(6))),
    "attach": Attach(session=SessionId("s-1")),
    "attached": Attached(session=SessionId("s-1")),
    "body": Body(stream=SEVEN, offset=65_536, payload=b"ab"),
    "batch": Batch(
        entries=(
            (EntryKind.START, SEVEN, 200, "text/event-stream"),
            (EntryKind.CHUNK, SEVEN, 0, b"data"),
            (EntryKind.CHUNK, SEVEN, 4, b"x" * 4_097),
            (EntryKind.END, SEVEN, 4_101, (1, 2, 0, "engine")),
        )
    ),
    "entry_start": Batch(entries=((EntryKind.START, SEVEN, 200, "application/json"),)),
    "entry_chunk": Batch(entries=((EntryKind.CHUNK, SEVEN, 65_536, b"data: 1\n\n"),)),
    "entry_end": Batch(entries=((EntryKind.END, SEVEN, 9, None),)),
    "entry_fail": Batch(
        entries=((EntryKind.FAIL, SEVEN, FailCode.ENGINE_UNAVAILABLE, "down", True, (5, 1, 0, "counted")),)
    ),
    "entry_refused": Batch(entries=((EntryKind.REFUSED, SEVEN, RefusalReason.AT_CAPACITY, 8),)),
    "entry_continue": Batch(entries=((EntryKind.CONTINUE, SEVEN, 1_048_576),)),
}


def hexdump(message: Message) -> str:
    """The golden text of `message`: 32 bytes a line, an empty line between two frames."""
    return "\n\n".join(map(_hexdump, encode(message))) + "\n"


def _hexdump(frame: bytes) -> str:
    if len(frame) > 512 and len(set(frame)) == 1:
        return f"{frame[:1].hex()} * {len(frame)}"
    return "\n".join(frame[at : at + 32].hex(" ") for at in range(0, len(frame), 32))


def frames_in(text: str) -> list[bytes]:
    """The frames of a golden text."""
    parts = [frame.partition("*") for frame in text.split("\n\n")]
    return [bytes.fromhex(pattern) * int(times or 1) for pattern, _, times in parts]


if __name__ == "__main__":
    for name, message in GOLDEN.items():
        path = FOLDER / f"{name}.hex"
        if not path.exists():
            path.write_text(hexdump(message))
