"""Where tuned kernel configurations of a mixture of experts are."""

from pathlib import Path

from xim_agent.planning.decision import Decision, Device, Given, Source

OPTION = "MoE kernel configurations"
VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
FOLDER = "moe-configs"


def configs_folder(given: Given) -> Path:
    """Where the agent keeps them: the operator's folder, else beside the model cache."""
    return given.settings.moe_config_path or given.places.caches / FOLDER


def choose_moe_configs(given: Given) -> Decision:
    """The folder that vLLM looks into before its own. It may be empty: vLLM then takes its own, or its defaults."""
    if given.model.moe is None:
        return Decision(option=OPTION, value="none", source=Source.MODEL, reason="a dense model has no experts")
    if not given.settings.moe_config_enabled:
        reason = "set by XEROTIER_AGENT_MOE_CONFIG_ENABLED"
        return Decision(option=OPTION, value="none", source=Source.OPERATOR, reason=reason)
    if given.device is Device.CPU:
        reason = "the configurations are for kernels of GPUs"
        return Decision(option=OPTION, value="none", source=Source.HARDWARE, reason=reason)
    folder = str(configs_folder(given))
    own = given.settings.moe_config_path is not None
    return Decision(
        option=OPTION,
        value=folder,
        source=Source.OPERATOR if own else Source.MODEL,
        reason=f"{given.model.moe.experts} experts" + ("; set by XEROTIER_AGENT_MOE_CONFIG_PATH" if own else ""),
        environment=((VARIABLE, folder),),
        forced=own,
    )
