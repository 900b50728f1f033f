"""What an engine is planned from on this machine: vLLM, the model and the hardware, each looked at once."""

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from xim_agent.engine.capabilities import GivenUp, engine_facts
from xim_agent.facts.hardware import HardwareFacts
from xim_agent.facts.model import ModelFacts, ModelUnreadable
from xim_agent.facts.read_hardware import read_this_machine
from xim_agent.facts.read_model import read_model
from xim_agent.link.credentials import DirectoryUnusable
from xim_agent.planning.decision import Given, Places, Wanted
from xim_agent.planning.engine_facts import PACKAGES_OF_INTEREST, EngineFacts
from xim_agent.planning.plan import EnginePlan, SocketPathTooLong, default_socket_path, plan_engine
from xim_agent.settings import AgentSettings, engine_environment

log = logging.getLogger(__name__)

UNASSIGNED = Wanted(served_name="unassigned")
"""Stands for the endpoint while none is assigned; the capacity does not depend on it."""


class PlaceUnusable(Exception):
    """The engine cannot be started on this machine as it is; `remedy` says what to do."""

    def __init__(self, message: str, remedy: str, *, lasting: bool = False) -> None:
        """`lasting`: another start would end the same way, while a missing file may be on a disk not mounted yet."""
        super().__init__(f"{message} {remedy}")
        self.message, self.remedy, self.lasting = message, remedy, lasting


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """Everything but the assignment."""

    settings: AgentSettings
    places: Places
    engine: EngineFacts
    model: ModelFacts
    hardware: HardwareFacts

    def plan(self, wanted: Wanted) -> EnginePlan:
        """How the engine is started for `wanted`.

        Raises:
            PlaceUnusable: the socket's path is too long.
        """
        given = Given(
            settings=self.settings,
            model=self.model,
            hardware=self.hardware,
            engine=self.engine,
            wanted=wanted,
            places=self.places,
            inherited=engine_environment(),
        )
        try:
            return plan_engine(given)
        except SocketPathTooLong as error:
            raise PlaceUnusable(str(error), "", lasting=True) from error


def look_around(settings: AgentSettings, given_up: GivenUp) -> Surroundings:
    """Look at vLLM, the model and the machine. Blocks, for half a minute when vLLM was never asked before; ends soon
    after `given_up` says that nobody waits for it.

    Raises:
        PlaceUnusable: vLLM or the model is missing or cannot be read.
    """
    executable = find_engine(settings)
    if executable is None:
        raise PlaceUnusable(
            f"The vLLM program {settings.vllm_path!r} is not there, or may not be executed.",
            "Install vLLM, or name it: --vllm-path or XEROTIER_AGENT_VLLM_PATH",
        )
    model = model_at(settings.initial_model_path)
    places = places_of(settings, executable)
    return Surroundings(
        settings=settings,
        places=places,
        engine=engine_facts(executable, places.caches, engine_environment(), given_up),
        model=model,
        hardware=this_machine(settings),
    )


def find_engine(settings: AgentSettings) -> str | None:
    """The path of vLLM's program, or None."""
    return shutil.which(settings.vllm_path)


def model_at(path: Path | None) -> ModelFacts:
    """The facts of the model at `path`.

    Raises:
        PlaceUnusable: it is none, or cannot be read.
    """
    if path is None:
        raise PlaceUnusable(
            "No model is named.",
            "Set XEROTIER_AGENT_INITIAL_MODEL_PATH to the directory of the model to serve.",
            lasting=True,
        )
    if not os.path.isdir(path) or not os.access(path, os.R_OK | os.X_OK):
        raise PlaceUnusable(
            f"{path} is no directory that uid {os.getuid()} can read.",
            "Point XEROTIER_AGENT_INITIAL_MODEL_PATH at the directory of a model in Hugging Face's layout.",
        )
    try:
        return read_model(path)
    except ModelUnreadable as error:
        raise PlaceUnusable(f"{error.file}: {error.what}.", error.remedy) from error


def this_machine(settings: AgentSettings) -> HardwareFacts:
    """The machine under the masks that the engine will start with."""
    inherited = engine_environment()
    return read_this_machine(
        cache=settings.model_cache_directory,
        cuda_mask=settings.cuda_visible_devices or inherited.get("CUDA_VISIBLE_DEVICES"),
        hip_mask=settings.hip_visible_devices or inherited.get("HIP_VISIBLE_DEVICES"),
    )


def places_of(settings: AgentSettings, executable: str) -> Places:
    """The paths that a plan names."""
    config = settings.config_directory
    return Places(
        executable=executable,
        socket_path=settings.vllm_socket_path
        or default_socket_path(Path(tempfile.gettempdir()), os.getuid(), config.absolute()),
        config=config,
        caches=settings.model_cache_directory.parent,
        lmcache=settings.cache_directory / "lmcache",
    )


def write_files(plan: EnginePlan, surroundings: Surroundings, wanted: Wanted) -> EnginePlan:
    """The plan, its files written; the plan without what needs them where they cannot be written."""
    try:
        for file in plan.files:
            file.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.path.unlink(missing_ok=True)
            # It may hold a password, so it is nobody else's from its first moment on.
            descriptor = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as opened:
                opened.write(file.content)
            log.info("Wrote LMCache configuration", extra={"config_path": str(file.path)})
    except OSError as error:
        log.warning(
            "LMCache is not used: its configuration cannot be written; the engine runs without KV offload",
            extra={"error": str(error), "remedy": DirectoryUnusable(surroundings.places.config, error).remedy},
        )
        packages = (surroundings.engine.packages or frozenset(PACKAGES_OF_INTEREST)) - {"lmcache"}
        without = replace(surroundings.engine, packages=packages)
        return replace(surroundings, engine=without).plan(wanted)
    return plan
