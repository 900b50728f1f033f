"""The whole agent as a process: enrollment, link, engine, signals, exit statuses."""

import asyncio
import json
import logging
import os
import signal
from glob import glob
from pathlib import Path

import psutil
import pytest

from tests.agent.agent_process import agent_process, granted
from tests.agent.link.enrollments import router as enrollment_router
from tests.agent.serving_parts import chat
from tests.house.sources import ROOT
from tests.support.programs import PATIENCE_S, alive, eventually
from tests.support.router_stub import RouterStub
from xim_agent.app import FAILED, FAILED_FOR_GOOD, StopRequest, _told_of
from xim_agent.cli import LastingError, SettingsError
from xim_agent.link.ends import LinkCause, LinkEnd, stop_for
from xim_agent.link.enrollment import EnrollmentFailed
from xim_protocol.enrollment import EnrollmentCode
from xim_protocol.events import AgentReported, GoodbyeReceived
from xim_protocol.ids import EndpointId
from xim_protocol.messages import AgentState, Assignment, GoodbyeCode, RefusalReason


async def ready(router: RouterStub, name: str = "tiny") -> None:
    """Return when the agent serves `name`."""
    await router.until(lambda: is_ready(router, name))


def is_ready(router: RouterStub, name: str) -> bool:
    session = router.session
    # What the session of a process that has ended said last tells nothing of the next one.
    return (
        session is not None
        and router.is_open
        and session.report.state is AgentState.READY
        and session.report.served_model == name
    )


async def test_from_a_join_key_to_an_answer_to_an_orderly_end(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        async with agent_process(tmp_path, enroll, VLLM_ARGS="--fake-start-seconds 0.3") as agent:
            await agent.says("enrollment successful", agent_id="agent-1")
            await router.opened()
            assert router.hellos[0].state in (AgentState.CONNECTING, AgentState.STARTING)
            await ready(router)
            answer = await router.ask(chat({"chunks": 10}))
            assert answer.ended
            assert answer.body.endswith(b"data: [DONE]\n\n")
            metrics = await agent.metrics()
            assert 'xim_agent_state{state="ready"} 1.0' in metrics
            assert "xim_agent_entries_per_message_bucket" in metrics
            assert 'xim_agent_streams_total{outcome="ended"} 1.0' in metrics
            assert "vllm:num_requests_running" in metrics
            children = agent.children()
            assert children

            # More than a window: it ends when the client takes it, and not before.
            router.consuming = False
            lasting = await router.submit(chat({"chunks": 600, "interval_ms": 0}))
            await router.until(lambda: lasting.chunks > 0)
            agent.signal()
            await agent.says("draining", in_flight=1)
            late = await router.ask(chat({"chunks": 1}))
            assert late.refused is not None
            await router.consume(lasting)
            await router.until(lambda: lasting.over)
            assert lasting.ended
            assert await agent.ended() == 0
            await router.until(lambda: bool(router.of_type(GoodbyeReceived)))
            assert router.of_type(GoodbyeReceived) == [GoodbyeReceived(code=GoodbyeCode.LEAVING, message="")]
            states = [event.state for event in router.of_type(AgentReported) if isinstance(event, AgentReported)]
            assert AgentState.DRAINING in states
            assert not alive(children)
            assert enroll.key().encode() not in "\n".join(agent.lines)


async def test_it_serves_whose_standard_input_is_closed(tmp_path: Path) -> None:
    """Some daemons start others so. What is opened first takes its place; the engine's guard must not read it."""
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        async with agent_process(tmp_path, enroll, without_input=True) as agent:
            await ready(router)
            assert (await router.ask(chat({"chunks": 3}))).ended
            agent.signal()
            assert await agent.ended() == 0


async def test_a_restart_needs_no_join_key(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        for join_key in (enroll, None):
            enroll.answers.append(granted(router))
            async with agent_process(tmp_path, join_key) as agent:
                await ready(router)
                agent.signal()
                assert await agent.ended() == 0
            assert router.session is not None
            router.session.end(None)
        assert enroll.paths() == ["/v1/enroll", "/v1/enroll/refresh"]


async def test_the_directory_of_the_socket_goes_with_the_agent_that_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        async with agent_process(tmp_path, enroll, VLLM_SOCKET_PATH="") as agent:
            await ready(router)
            assert len(glob(f"{tmp_path}/xim-*/engine.sock")) == 1
            agent.signal()
            assert await agent.ended() == 0
    assert glob(f"{tmp_path}/xim-*") == []


async def test_a_second_signal_forces_and_leaves_no_process(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        async with agent_process(tmp_path, enroll, VLLM_ARGS="--fake-ignore-sigterm --fake-spawn-child") as agent:
            await ready(router)
            children = agent.children()
            await router.submit(chat({"hang": True}))
            async with asyncio.timeout(PATIENCE_S):
                while "xim_agent_streams_in_flight 1.0" not in await agent.metrics():
                    pass
            agent.signal()
            await agent.says("draining", in_flight=1)
            agent.signal()
            assert await agent.ended() == 1
            assert not alive(children)


async def test_a_terminal_that_closes_asks_for_an_orderly_end(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        async with agent_process(tmp_path, enroll) as agent:
            await ready(router)
            children = agent.children()
            agent.signal(signal.SIGHUP)
            assert await agent.ended() == 0
            assert agent.said("draining")
            assert agent.said("stopped")
            assert not alive(children)


async def test_under_nohup_a_terminal_that_closes_changes_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.asked.wait()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(signal.SIGHUP, before)


async def test_a_terminal_that_closes_hurries_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The shell in it passes its own SIGHUP on, and the kernel sends another one when the shell has ended."""
    caplog.set_level(logging.INFO)
    stop, me = StopRequest(), asyncio.current_task()
    assert me is not None
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        await stop.asked.wait()
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: caplog.messages.count("signal") == 2, what="the second one is heard")
        assert not me.cancelling()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(asyncio.CancelledError):
            await eventually(lambda: False, what="who does not want to wait is heard")
        assert me.uncancel() == 0
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)


async def test_a_signal_while_vllm_is_asked_for_its_flags_ends_the_agent(tmp_path: Path) -> None:
    """The first start asks vLLM, which may take minutes; here it never answers, and its child holds the pipe."""
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\nsleep 1000 &\nwait\n")
    program.chmod(0o755)
    async with agent_process(tmp_path, None, VLLM_PATH=str(program)) as agent:
        await agent.says("asking vLLM for its flags")
        await eventually(lambda: len(agent.children()) == 2, what="vLLM is asked")
        children = agent.children()
        agent.signal()
        assert await agent.ended() == 0
        await eventually(lambda: not alive(children), what="who was asked is killed")
        assert not agent.said("vLLM did not tell its flags")


async def test_two_processes_of_one_identity_end_with_the_remedy(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        async with agent_process(tmp_path, enroll) as agent:
            await router.opened()
            await router.goodbye(GoodbyeCode.SUPERSEDED)
            assert await agent.ended() == FAILED_FOR_GOOD
            assert any("Two agents share one config directory" in line for line in agent.lines)
            assert not any("Traceback" in line for line in agent.lines)


async def test_a_router_of_another_version_is_no_end_while_another_one_serves(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as first, RouterStub() as second:
        for router in (first, second):
            router.admit_all = True
            router.name_routers(first.member, second.member)
        enroll.answers.append(granted(first))
        async with agent_process(tmp_path, enroll) as agent:
            await ready(first)
            await ready(second)
            await second.goodbye(GoodbyeCode.VERSION_UNSUPPORTED)
            await agent.says("no link to the router", problem="version_unsupported")
            assert (await first.ask(chat({"chunks": 3}))).ended
            await first.goodbye(GoodbyeCode.VERSION_UNSUPPORTED)
            assert await agent.ended() == FAILED_FOR_GOOD
            assert any("Update the older of the two" in line for line in agent.lines)


async def test_an_agent_that_was_long_without_a_router_serves_again_when_there_is_one(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        async with agent_process(tmp_path, enroll, DEGRADED_TO_FAILED_TIMEOUT_SECONDS="1") as agent:
            await ready(router)
            assert router.session is not None
            router.admit_all = False
            router.session.expire()
            await router.flush()
            await agent.says("state", state="failed", before="degraded")
            router.admit_all = True
            await ready(router)


async def test_another_assignment_restarts_the_engine(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router, served_name=None))
        async with agent_process(tmp_path, enroll) as agent:
            await agent.says("waiting for an assignment")
            await router.opened()
            for name in ("first", "second"):
                await router.assign(Assignment(endpoint=EndpointId("e"), served_name=name, model="model"))
                await ready(router, name)
                answer = await router.ask(chat({"chunks": 1}, stream=False))
                assert json.loads(answer.body)["model"] == name


async def test_an_agent_whose_assignment_is_taken_away_is_idle(tmp_path: Path) -> None:
    """One that stays degraded has failed in the end, and requests for its next endpoint would not wait for it."""
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router, served_name=None))
        async with agent_process(tmp_path, enroll) as agent:
            await router.opened()
            await router.assign(Assignment(endpoint=EndpointId("e"), served_name="first", model="model"))
            await ready(router, "first")
            await router.assign(None)
            await agent.says("state", state="idle", before="degraded")
            await agent.says("assignment", served_name=None)
            await router.assign(Assignment(endpoint=EndpointId("e"), served_name="second", model="model"))
            await agent.says("state", state="starting", before="idle")
            await ready(router, "second")


async def test_what_is_missing_is_told_with_its_remedy(tmp_path: Path) -> None:
    async with agent_process(tmp_path, None, VLLM_PATH=str(tmp_path / "nothing")) as agent:
        assert await agent.ended() == 1
        assert any("XEROTIER_AGENT_VLLM_PATH" in line for line in agent.lines)
    async with agent_process(tmp_path, None) as agent:
        assert await agent.ended() == FAILED_FOR_GOOD
        assert any("XEROTIER_AGENT_JOIN_KEY" in line for line in agent.lines)
    async with agent_process(tmp_path, None, INITIAL_MODEL_PATH="") as agent:
        assert await agent.ended() == FAILED_FOR_GOOD
        assert any("No model is named." in line for line in agent.lines)


def test_what_lasts_is_told_from_what_another_start_may_mend() -> None:
    lasting = {code for code in EnrollmentCode if EnrollmentFailed.known(code).lasting}
    assert {code for code in EnrollmentCode if code not in lasting} == {
        EnrollmentCode.AGENT_SUSPENDED,
        EnrollmentCode.CONTROL_UNAVAILABLE,
        EnrollmentCode.CERTIFICATE_INVALID,
        EnrollmentCode.TLS_NOT_SPOKEN,
        EnrollmentCode.ENROLL_UNREACHABLE,
        EnrollmentCode.CONTROL_PORT_UNREACHABLE,
        EnrollmentCode.STREAMING_PORT_UNREACHABLE,
    }
    for code in (GoodbyeCode.REVOKED, GoodbyeCode.SUPERSEDED, GoodbyeCode.VERSION_UNSUPPORTED):
        stopped = stop_for(LinkEnd(cause=LinkCause.GOODBYE, code=code))
        assert stopped is not None
        assert _told_of(BaseExceptionGroup("", [OSError(), BaseExceptionGroup("", [stopped])])) == FAILED_FOR_GOOD
    assert _told_of(BaseExceptionGroup("", [EnrollmentFailed.known(EnrollmentCode.ENROLL_UNREACHABLE)])) == FAILED


def test_the_service_is_not_started_again_after_what_lasts() -> None:
    assert LastingError.exit_code == FAILED_FOR_GOOD
    unit = (ROOT / "docs" / "howto" / "deploy-a-node.md").read_text(encoding="utf-8")
    assert f"\nRestartPreventExitStatus={SettingsError.exit_code} {FAILED_FOR_GOOD}\n" in unit


async def test_an_engine_that_cannot_start_ends_the_agent_with_its_last_lines(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        async with agent_process(tmp_path, enroll, VLLM_ARGS="--fake-start-fail 2") as agent:
            assert await agent.ended() == FAILED_FOR_GOOD
            assert agent.said("engine given up")
            assert any("vLLM does not take one of its options" in line for line in agent.lines)
            assert any("Engine core initialization failed" in line for line in agent.lines)
        await router.until(lambda: bool(router.of_type(GoodbyeReceived)))


async def test_an_engine_that_crashes_keeps_the_lease_and_refuses_until_it_is_back(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        async with agent_process(
            tmp_path, enroll, LEASE_RENEWAL_INTERVAL_MS="200", HEALTH_CHECK_INTERVAL="0.1"
        ) as agent:
            await ready(router)
            session = router.session
            assert session is not None
            engine = next(child for child in agent.children() if is_main(child))
            engine.kill()
            await agent.says("state", state="degraded", before="ready")
            refused = await router.ask(chat({"chunks": 1}))
            assert refused.refused is not None
            assert refused.refused.reason is RefusalReason.NOT_READY
            await agent.says("state", state="ready", before="degraded")
            await ready(router)
            answer = await router.ask(chat({"chunks": 3}))
            assert answer.ended
            assert router.session is session
            assert len(router.hellos) == 1
            assert agent.said("engine ended", status=137, trouble="killed")
            # The router hears the engine's own figures with a renewal.
            await router.until(lambda: "num_requests_running" in told_figures(router))


async def test_an_engine_that_stays_away_is_failed_after_the_timeout(tmp_path: Path) -> None:
    async with enrollment_router() as enroll, RouterStub() as router:
        enroll.answers.append(granted(router))
        slow = "--fake-start-seconds 3"
        async with agent_process(
            tmp_path, enroll, VLLM_ARGS=slow, DEGRADED_TO_FAILED_TIMEOUT_SECONDS="1", HEALTH_CHECK_INTERVAL="3600"
        ) as agent:
            await ready(router)
            next(child for child in agent.children() if is_main(child)).kill()
            await agent.says("state", state="failed", before="degraded")
            await agent.says("state", state="ready", before="failed")
            agent.signal()
            assert await agent.ended() == 0


def is_main(process: psutil.Process) -> bool:
    """It is the engine, not its guard."""
    words = process.cmdline()
    return "--uds" in words and not any(word.endswith("guard.py") for word in words)


def told_figures(router: RouterStub) -> set[str]:
    """Names of the figures that the agent's latest renewals carried."""
    reports = [event for event in router.of_type(AgentReported) if isinstance(event, AgentReported)]
    return {name for report in reports for name, _ in report.statistics}
