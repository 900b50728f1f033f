"""Plans for described NVIDIA machines against the real vLLM: it configures itself as each says, and refuses none."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from demo.engine import choose_engine
from tests.agent.planning.givens import AGENT_TESTS, machine, planned
from tests.agent.planning.golden_plans import PAIRS, Pair
from tests.support.programs import clean_environment
from xim_agent.facts.hardware import Vendor
from xim_agent.planning.budget import in_flight_tokens
from xim_agent.planning.memory import kv_bytes_per_token
from xim_agent.planning.operator_words import number_of
from xim_agent.planning.plan import EnginePlan
from xim_agent.planning.render import command_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).parent / "described_platform.py"
NVIDIA = sorted(
    {pair.machine for pair in PAIRS if any(gpu.vendor is Vendor.NVIDIA for gpu in machine(pair.machine).gpus)}
)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that vLLM looks at every model's class once."""
    return tmp_path_factory.mktemp("caches")


@pytest.mark.parametrize("name", NVIDIA)
def test_vllm_configures_itself_as_the_plan_says(name: str, caches: Path) -> None:
    plans = {pair.name: pair.plan() for pair in PAIRS if pair.machine == name}
    derived = asked(
        name, {pair.name: argv_of(pair, plans[pair.name]) for pair in PAIRS if pair.machine == name}, caches
    )
    for pair_name, plan in plans.items():
        found = derived[pair_name]
        batch, refused = found.pop("batch", None), found.pop("refused", None)
        if refused is not None:
            assert plan.problems, f"{pair_name}: {refused}"
            continue
        assert found == {**found, **expected(plan)}, pair_name
        assert in_flight_tokens(plan.given) == (batch if plan.given.pooling else 2 * batch), pair_name


def test_vllm_refuses_what_the_plan_warns_of(caches: Path) -> None:
    path = str(AGENT_TESTS / "models" / "llama-3.1-8b")
    plans = {size: planned("a40-x4", "llama-3.1-8b", TENSOR_PARALLEL_SIZE=size) for size in ("3", "8")}
    for plan in plans.values():
        assert any("vLLM will refuse it" in sentence for sentence in plan.warnings)
    derived = asked("a40-x4", {size: [path, *command_of(plan).argv[3:]] for size, plan in plans.items()}, caches)
    assert "must be divisible by tensor parallel size" in derived["3"]["refused"]
    assert "larger than the number of available GPUs" in derived["8"]["refused"]


def argv_of(pair: Pair, plan: EnginePlan) -> list[str]:
    """The words after `vllm serve`, with the model where it is described."""
    return [str(AGENT_TESTS / "models" / pair.model), *command_of(plan).argv[3:]]


def expected(plan: EnginePlan) -> dict[str, Any]:
    """What vLLM should derive, as far as the plan has a word on it."""
    model, budget = plan.given.model, plan.budget
    said = {each.option: each for each in plan.decisions}
    arguments = {words[0]: words for each in plan.decisions for words in each.arguments}
    length = number_of(said["context length"].value)
    layers = model.layers.full + model.layers.sliding
    token = kv_bytes_per_token(
        model, dtype_bytes=budget.kv_dtype_bytes, tensor_parallel_size=budget.tensor_parallel_size
    )
    return {
        "tensor_parallel_size": plan.tensor_parallel_size,
        **({} if length is None else {"max_model_len": length}),
        "max_num_seqs": number_of(said["max num seqs"].value),
        "quantized": said["quantization"].value != "none",
        "pooling": plan.given.pooling,
        "eager": "--enforce-eager" in arguments,
        "offload_gib": float(arguments["--kv-offloading-size"][1]) if "--kv-offloading-size" in arguments else None,
        "guessed_tokens": budget.guessed_tokens,
        **({"layer_token_bytes": token // layers} if layers else {}),
    }


def asked(name: str, argvs: dict[str, list[str]], caches: Path) -> dict[str, dict[str, Any]]:
    """What vLLM derives from each command line on the machine of this name."""
    gpus = machine(name).gpus
    gpu = {
        "name": gpus[0].name,
        "memory_bytes": gpus[0].memory_bytes,
        "capability": gpus[0].compute_capability,
        "count": len(gpus),
    }
    with open(choose_engine().path, encoding="utf-8") as program:
        python = program.readline().removeprefix("#!").strip()
    done = subprocess.run(
        [python, str(PROGRAM)],
        input=json.dumps({"gpu": gpu, "plans": argvs}),
        env=clean_environment(VLLM_CACHE_ROOT=str(caches), HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1"),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    derived: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1].removeprefix("derived "))
    return derived
