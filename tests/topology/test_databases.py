"""The whole way on both databases: set up by the commands, enrolled, answered, restarted, revoked."""

from pathlib import Path

from tests.support.accounts import ENDPOINT, Accounts
from tests.support.fake_vllm_script import expected_text
from tests.support.topology import Topology
from tests.topology.scripts import asking
from xim_protocol.enrollment import FAILURES, EnrollmentCode


async def test_a_stream_is_answered_and_a_revoked_agent_is_gone_within_a_second(
    tmp_path: Path, database_url: str
) -> None:
    on_postgresql = database_url.startswith("postgresql")
    accounts = Accounts.prepare(tmp_path / "data", database_url if on_postgresql else "", ["alpha"])
    async with Topology(accounts, database_url=database_url if on_postgresql else "") as topology:
        node = await topology.start_node()
        await topology.router.terminate()
        topology.router.start()
        await topology.ready(program=node.program)
        stream = await topology.client().chat.completions.create(
            model=ENDPOINT, messages=asking(chunks=20, text_chars=30, interval_ms=2, seed=1), stream=True
        )
        text = "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])
        assert text == expected_text(1, 600)
        assert (await topology.cli("agent", "revoke", node.agent_id)).status == 0
        revoked = topology.stopwatch()

        async def none() -> bool:
            return await topology.agents_ready() == 0

        await revoked.within(1.0, none, what="the revoked agent is gone")
        assert await node.program.ended() == 3
        assert FAILURES[EnrollmentCode.AGENT_REVOKED].remedy in node.program.tail()
