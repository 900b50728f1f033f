"""A misspelt variable is told by the program that it was meant for, and no other variable by any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.settings import AgentSettings
from xim_agent.settings_check import warnings
from xim_router.settings import declared
from xim_router.settings_check import unknown_variables

ROUTER = "XEROTIER_ROUTER"
AGENT = "XEROTIER_AGENT"
VARIABLES = [
    *(setting.variable for setting in declared() if setting.variable.startswith(ROUTER)),
    *(str(info.alias) for info in AgentSettings.model_fields.values() if str(info.alias).startswith(AGENT)),
]
SECRET = "a value that nobody may see"

TYPICAL = [
    *("HOME", "PATH", "LANG", "LC_ALL", "TZ", "USER", "SHELL", "HOSTNAME", "PWD", "TERM", "TMPDIR"),
    *("INVOCATION_ID", "JOURNAL_STREAM", "NOTIFY_SOCKET", "STATE_DIRECTORY", "LISTEN_PIDS", "SSL_CERT_FILE"),
    *("XDG_DATA_HOME", "XDG_DATA_DIRS", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "XDG_SESSION_ID"),
    *("XERO_CLIENT_ID", "XERO_CLIENT_SECRET", "XERO_API_KEY", "XERO_WEBHOOK_KEY", "XERO_HOST", "XERO_ROUTER_HTTP_PORT"),
    *("ZEROTIER_API_SECRET", "ZEROTIER_NETWORK_ID", "ZEROTIER_IDENTITY_PUBLIC", "ZEROTIER_ONE_CHOWN"),
    *("XIM", "XIM_ARGS", "XIM_PROGRAM", "XMODIFIERS", "ROUTER_HTTP_PORT", "AGENT_NAME", "AGENT_HOME", "JOIN_KEY"),
    *("XEROTIER_PROJECT", "XEROTIER_API_KEY", "XEROTIER_CPU_IMAGE", "XEROTIER_IMAGE_TAG", "XEROTIER_DASHBOARD_URL"),
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NCCL_DEBUG"),
    *("VLLM_ARGS", "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE", "HF_HOME", "HF_TOKEN", "PYTHONPATH", "OMP_NUM_THREADS"),
    *("OPENAI_BASE_URL", "OPENAI_API_KEY", "POSTGRES_PASSWORD", "DATABASE_URL", "HTTP_PROXY", "no_proxy", "LOG_LEVEL"),
]

# What Kubernetes puts into every container for services called xerotier-router and xerotier-agent-metrics.
SERVICES = {
    f"{service}_{rest}": "tcp://10.0.0.7:8080"
    for service in (ROUTER, f"{AGENT}_METRICS_HTTP")
    for rest in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8080_TCP", "PORT_8080_TCP_ADDR")
}


def told(name: str, value: str = SECRET) -> dict[str, str | None]:
    """What each program says of this variable: the one that it takes for meant."""
    found = dict(unknown_variables({name: value}))
    for sentence in warnings({name: value}):
        assert sentence.startswith(f"{name} is not a setting; the nearest one is ")
        assert name not in found, "both programs take it for theirs"
        found[name] = sentence.removesuffix(".").rpartition(" ")[2]
    assert SECRET not in str(found)
    return found


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("XEROTIER_ROUTE_HTTP_PORT", "XEROTIER_ROUTER_HTTP_PORT"),
        ("XEROTIR_ROUTER_TLS_CERT", "XEROTIER_ROUTER_TLS_CERT"),
        ("XEROTIERROUTER_TLS_KEY", "XEROTIER_ROUTER_TLS_KEY"),
        ("XEROTIER_ROUTERS_SHUTDOWN_GRACE", "XEROTIER_ROUTER_SHUTDOWN_GRACE_S"),
        ("ZEROTIER_ROUTER_DATABASE_URL", "XEROTIER_ROUTER_DATABASE_URL"),
        ("xerotier_route_http_port", "XEROTIER_ROUTER_HTTP_PORT"),
        ("XEROTIER_SINGEL_AGENT_QUEUE_TIMEOUT_S", "XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S"),
        ("XEROTIER_HTTP_PORT", "XEROTIER_ROUTER_HTTP_PORT"),
        ("XEROTIER_AGNT_JOIN_KEY", "XEROTIER_AGENT_JOIN_KEY"),
        ("XEROTIER_AGNT_METRICS_PORT", "XEROTIER_AGENT_METRICS_PORT"),
        ("XEROTIER_XIM_AGENT_JOIN_KEY", "XEROTIER_AGENT_JOIN_KEY"),
        ("XEROTIER_JOIN_KEY", "XEROTIER_AGENT_JOIN_KEY"),
        ("xerotier_agent_max_concurrent", "XEROTIER_AGENT_MAX_CONCURRENT"),
    ],
)
def test_a_variable_that_begins_wrongly_is_told_with_the_one_that_was_meant(name: str, meant: str) -> None:
    assert told(name) == {name: meant}


def test_a_variable_that_lacks_its_program_is_told_by_each_program_that_has_it() -> None:
    assert unknown_variables({"XEROTIER_LOG_LEVEL": "debug"}) == {"XEROTIER_LOG_LEVEL": "XEROTIER_ROUTER_LOG_LEVEL"}
    (sentence,) = warnings({"XEROTIER_LOG_LEVEL": "debug"})
    assert sentence.endswith("the nearest one is XEROTIER_AGENT_LOG_LEVEL.")


@given(st.sampled_from(VARIABLES), st.integers(0, len(AGENT) - 2), st.sampled_from(["lacks", "doubles", "swaps"]))
def test_one_slip_before_the_rest_of_a_name_is_always_told_by_its_program_alone(
    variable: str, at: int, slip: str
) -> None:
    pair = variable[at : at + 2]
    written = {"lacks": pair[1], "doubles": pair[0] + pair, "swaps": pair[::-1]}[slip]
    name = variable[:at] + written + variable[at + 2 :]
    assert told(name) == ({} if name == variable else {name: variable})


@pytest.mark.parametrize("name", [*TYPICAL, *VARIABLES, "XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S", "XEROTIER_AGENT_BIN"])
def test_what_is_not_misspelt_or_somebody_elses_is_not_told(name: str) -> None:
    assert unknown_variables({name: "1"}) == {}
    assert [sentence for sentence in warnings({name: "1"}) if "is not a setting" in sentence] == []


def test_what_kubernetes_makes_of_services_is_not_told() -> None:
    assert unknown_variables(SERVICES) == {}
    assert warnings(SERVICES) == []
    assert told(f"{ROUTER}_PORT") != {}


def test_an_empty_variable_counts_as_unset() -> None:
    assert told("XEROTIER_ROUTE_HTTP_PORT", "") == {}
    assert told("XEROTIER_ROUTER_HTP_PORT", "") == {}
    assert told("XEROTIER_AGNT_JOIN_KEY", "") == {}
