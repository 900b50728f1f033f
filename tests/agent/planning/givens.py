"""What plans are made from in these tests: published models, described machines, the flags of a real vLLM."""

import functools
import json
from dataclasses import replace
from pathlib import Path

from xim_agent.facts.hardware import HardwareFacts
from xim_agent.facts.model import ModelFacts
from xim_agent.facts.read_model import read_model
from xim_agent.planning.decision import Decision, Given, Places, Wanted
from xim_agent.planning.engine_facts import EngineFacts
from xim_agent.planning.plan import EnginePlan, plan_engine
from xim_agent.settings import AgentSettings

AGENT_TESTS = Path(__file__).parents[1]
A = "XEROTIER_AGENT_"
PLACES = Places(
    executable="/usr/local/bin/xerotier-vllm",
    socket_path=Path("/run/xim/engine.sock"),
    config=Path("/var/lib/inference/.config/xerotier"),
    caches=Path("/var/lib/inference/.cache/xerotier"),
    lmcache=Path("/var/lib/inference/.cache/lmcache"),
)


@functools.cache
def machine(name: str) -> HardwareFacts:
    """A described machine."""
    return HardwareFacts.from_json((AGENT_TESTS / "machines" / f"{name}.json").read_bytes())


@functools.cache
def model(name: str) -> ModelFacts:
    """A published model's facts, under a path of no machine."""
    return replace(read_model(AGENT_TESTS / "models" / name), path=Path("/models") / name)


@functools.cache
def vllm(platform: str = "") -> EngineFacts:
    """vLLM 0.32 with its own flags and without further packages; `platform` as its version names it, `+cpu`."""
    stored = json.loads((Path(__file__).parent / "vllm-0.32.0.json").read_text(encoding="utf-8"))
    return EngineFacts(
        version=stored["version"] + platform,
        flags=frozenset(stored["flags"]),
        fits_context=stored["fits_context"],
        packages=frozenset(),
    )


def settings(**values: object) -> AgentSettings:
    """Settings by their variables' names without prefix; `HIP_VISIBLE_DEVICES` as it is."""
    named = {name if name.startswith("HIP_") else A + name: value for name, value in values.items()}
    return AgentSettings(**named)  # type: ignore[arg-type]


def given(
    machine_name: str | HardwareFacts = "h200",
    model_name: str | ModelFacts = "llama-3.1-8b",
    *,
    engine: EngineFacts | None = None,
    wanted: Wanted | None = None,
    inherited: dict[str, str] | None = None,
    **values: object,
) -> Given:
    """One situation."""
    hardware = machine(machine_name) if isinstance(machine_name, str) else machine_name
    return Given(
        settings=settings(**values),
        model=model(model_name) if isinstance(model_name, str) else model_name,
        hardware=hardware,
        engine=engine or vllm("" if hardware.gpus else "+cpu"),
        wanted=wanted or Wanted(served_name="chat"),
        places=PLACES,
        inherited=inherited or {},
    )


def planned(
    machine_name: str | HardwareFacts = "h200", model_name: str | ModelFacts = "llama-3.1-8b", **more: object
) -> EnginePlan:
    """The plan of `given` with the same arguments."""
    return plan_engine(given(machine_name, model_name, **more))  # type: ignore[arg-type]


def decision(plan: EnginePlan, option: str) -> Decision:
    """The one decision on `option`."""
    (found,) = (each for each in plan.decisions if each.option == option)
    return found


def words(of: Decision) -> str:
    """The arguments of a decision, with spaces between them."""
    return " ".join(word for each in of.arguments for word in each)
