"""Plans against the real vLLM: it takes every flag of theirs, and it starts on this machine as they say."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from demo.engine import choose_engine
from demo.prepare_engine import ROOT
from tests.agent.planning.givens import vllm
from tests.agent.planning.golden_plans import PAIRS
from tests.engine.control_group import control_group
from tests.support.programs import Program, clean_environment, eventually
from xim_agent.engine.capabilities import engine_facts
from xim_agent.planning.render import command_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL = ROOT / "demo" / "model" / "xim-tiny"
START_S = 300.0
GIB = 1024**3
AGAIN = "What is XIM? What is XIM? What is XIM?"

PARSE = """
import json, sys
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser(prog="vllm")
commands = cmd_init()
subparsers = parser.add_subparsers(dest="subparser")
for command in commands:
    command.subparser_init(subparsers)
refused = {}
for name, argv in json.load(sys.stdin).items():
    try:
        arguments = parser.parse_args(argv)
        commands[0].validate(arguments)
    except (SystemExit, Exception) as error:
        refused[name] = repr(error)
print("refused", json.dumps(refused))
"""


def parsed(argvs: dict[str, list[str]]) -> dict[str, str]:
    """What vLLM's own parser has against each command line; one process for all."""
    with open(choose_engine().path, encoding="utf-8") as program:
        python = program.readline().removeprefix("#!").strip()
    done = subprocess.run(
        [python, "-c", PARSE], input=json.dumps(argvs), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    refused: dict[str, str] = json.loads(done.stdout.splitlines()[-1].removeprefix("refused "))
    return {name: f"{error}\n{done.stderr[-2000:]}" for name, error in refused.items()}


def test_vllms_own_parser_takes_every_plan_and_refuses_a_wrong_flag() -> None:
    plans = {pair.name: list(command_of(pair.plan()).argv[1:]) for pair in PAIRS}
    wrong = [*next(iter(plans.values())), "--no-such-flag"]
    assert list(parsed({**plans, "wrong": wrong})) == ["wrong"]


def test_the_flags_that_plans_are_tested_with_are_the_real_ones(tmp_path: Path) -> None:
    engine = choose_engine()
    found = engine_facts(engine.path, tmp_path, clean_environment())
    if found.version is None or not found.version.startswith("0.32.0"):
        pytest.skip(f"this vLLM is {found.version}")
    assert found.flags == vllm().flags
    assert found.fits_context == vllm().fits_context
    assert found.on_cpu == engine.on_cpu


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all starts, so that vLLM is asked for its flags once."""
    return tmp_path_factory.mktemp("caches")


@asynccontextmanager
async def started(
    tmp_path: Path, caches: Path, *, within: Sequence[str] = (), **settings: str
) -> AsyncIterator[tuple[dict[str, Any], httpx2.AsyncClient, Program]]:
    """A real vLLM, started as the plan says; `within` are words before every command."""
    socket = tmp_path / "engine.sock"
    variables = {
        "VLLM_PATH": choose_engine().path,
        "VLLM_SOCKET_PATH": str(socket),
        "MODEL_CACHE_PATH": str(caches / "models"),
        **settings,
    }
    environment = clean_environment(**{f"XEROTIER_AGENT_{name}": value for name, value in variables.items()})
    shown = await asyncio.to_thread(
        subprocess.run,
        [*within, sys.executable, "-m", "xim_agent", "plan", "--model", str(MODEL), "--served-name", "tiny", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    plan = json.loads(shown.stdout)
    program = Program("vllm", [*within, *plan["command"]], clean_environment(**plan["environment"]), tmp_path / "log")
    transport = httpx2.AsyncHTTPTransport(uds=str(socket))
    async with httpx2.AsyncClient(transport=transport, base_url="http://engine", timeout=60.0) as client:

        async def serves() -> bool:
            assert program.running, program.tail()
            try:
                return (await client.get("/health")).status_code == 200
            except httpx2.TransportError:
                return False

        program.start()
        assert program.process is not None
        whole = psutil.Process(program.process.pid)
        try:
            await eventually(serves, within_s=START_S, what="vLLM serves")
            yield plan, client, program
        finally:
            children = whole.children(recursive=True) if whole.is_running() else []
            await program.terminate(60)
            psutil.wait_procs(children, timeout=20)


async def completed(client: httpx2.AsyncClient, **more: object) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": AGAIN, "max_tokens": 48, "temperature": 0, "ignore_eos": True, **more}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    usage: dict[str, Any] = answer.json()["usage"]
    return usage


def workers(program: Program) -> list[psutil.Process]:
    """The processes that compute, by the title that they give themselves."""
    assert program.process is not None
    children = psutil.Process(program.process.pid).children(recursive=True)
    return [each for each in children if each.name().startswith("VLLM::Worker")]


async def test_the_plan_for_this_machine_starts_with_native_defaults(tmp_path: Path, caches: Path) -> None:
    async with started(tmp_path, caches) as (plan, client, program):
        assert (await completed(client))["completion_tokens"] == 48
        if choose_engine().on_cpu:
            assert plan["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
            # The server may use every core; only the workers' threads are bound.
            assert program.process is not None
            server = psutil.Process(program.process.pid)
            assert server.cpu_affinity() == psutil.Process().cpu_affinity()
            assert workers(program)


async def test_the_plan_starts_with_ngram_speculation_and_it_speculates(tmp_path: Path, caches: Path) -> None:
    on = {"SPECULATIVE_ENABLED": "1", "SPECULATIVE_NGRAM_FALLBACK": "1", "VLLM_DISABLE_CUDA_GRAPHS": "1"}
    async with started(tmp_path, caches, **on) as (plan, client, _):
        assert '"method":"ngram"' in " ".join(plan["command"])
        assert (await completed(client))["completion_tokens"] == 48
        metrics = (await client.get("/metrics")).text
        drafted = [line for line in metrics.splitlines() if line.startswith("vllm:spec_decode_num_draft_tokens_total")]
        assert sum(float(line.split()[-1]) for line in drafted) > 0


async def test_the_plan_starts_within_a_control_group_and_keeps_to_it(tmp_path: Path, caches: Path) -> None:
    if not choose_engine().on_cpu:
        pytest.skip("memory and cores of a control group concern an engine on the CPU")
    with control_group(memory_bytes=8 * GIB, cpus=1.0) as within:
        async with started(tmp_path, caches, within=within, VLLM_DISABLE_CUDA_GRAPHS="1") as (plan, client, program):
            assert plan["hardware"]["ram_limit_bytes"] == 8 * GIB
            assert plan["hardware"]["cpu_limit"] == 1.0
            environment = plan["environment"]
            assert environment["OMP_NUM_THREADS"] == "1"
            assert environment["VLLM_CPU_OMP_THREADS_BIND"].isdigit()
            assert (await completed(client))["completion_tokens"] == 48
            bound = int(environment["VLLM_CPU_OMP_THREADS_BIND"])
            assert [each.cpu_affinity() for each in workers(program)] == [[bound]]
