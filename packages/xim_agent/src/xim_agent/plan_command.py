"""`xerotier-xim-agent plan`: how vLLM would be started, here or on a described machine, and why."""

import json
from pathlib import Path

from xim_agent.engine.capabilities import engine_facts, remembered
from xim_agent.facts.hardware import HardwareFacts, HardwareUnreadable
from xim_agent.planning.decision import Given, Wanted
from xim_agent.planning.engine_facts import EngineFacts
from xim_agent.planning.plan import EnginePlan, SocketPathTooLong, plan_engine
from xim_agent.planning.render import as_json, as_text
from xim_agent.settings import AgentSettings, engine_environment
from xim_agent.surroundings import PlaceUnusable, find_engine, model_at, places_of, this_machine


def shown_plan(
    settings: AgentSettings, *, hardware: Path | None, model: Path | None, wanted: Wanted, json_form: bool
) -> tuple[str, bool]:
    """The plan as text or JSON, and whether the engine can be started like it.

    `hardware` describes a machine that is not this one; then vLLM is not asked for its flags and nothing of this
    machine's environment counts. `model` stands in for INITIAL_MODEL_PATH.

    Raises:
        PlaceUnusable: the model or the description cannot be read.
    """
    described = hardware is not None
    executable = find_engine(settings)
    places = places_of(settings, executable or settings.vllm_path)
    given = Given(
        settings=settings,
        model=model_at(model.absolute() if model is not None else settings.initial_model_path),
        hardware=this_machine(settings) if hardware is None else read_description(hardware),
        engine=_engine(executable, places.caches, ask=not described),
        wanted=wanted,
        places=places,
        inherited={} if described else engine_environment(),
    )
    plan = _planned(given)
    text = json.dumps(as_json(plan), indent=2) + "\n" if json_form else as_text(plan)
    return text, not plan.problems


def read_description(file: Path) -> HardwareFacts:
    """The machine that `file` describes: a description, or a whole plan in JSON, which holds one.

    Raises:
        PlaceUnusable: it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("hardware"), dict):
            content = content["hardware"]
        return HardwareFacts.from_json(json.dumps(content))
    except HardwareUnreadable as error:
        raise PlaceUnusable(f"{file}: {error}", "") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PlaceUnusable(
            f"{file} cannot be read: {error}.", "Name a file with a machine's description in JSON."
        ) from error


def _engine(executable: str | None, folder: Path, *, ask: bool) -> EngineFacts:
    """What is known of vLLM; everything is taken to be there where it is not installed."""
    if executable is None:
        return EngineFacts()
    if ask:
        return engine_facts(executable, folder, engine_environment())
    return remembered(executable, folder) or EngineFacts()


def _planned(given: Given) -> EnginePlan:
    try:
        return plan_engine(given)
    except SocketPathTooLong as error:
        raise PlaceUnusable(str(error), "") from error
