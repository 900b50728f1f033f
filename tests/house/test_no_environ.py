"""The environment is read by the two settings modules, so that no variable exists that nobody documents."""

import pytest

from tests.house.sources import ROOT, name_of, names_used, parsed, python_files

MAY_READ = {
    "packages/xim_agent/src/xim_agent/settings.py": "the settings, and what the engine inherits",
    "packages/xim_agent/src/xim_agent/vllm_plugin/xim_vllm_gdn.py": "runs in vLLM's environment, without the agent",
    "packages/xim_agent/src/xim_agent/vllm_plugin/xim_vllm_launch.py": "runs in vLLM's environment, without the agent",
    "packages/xim_router/src/xim_router/settings.py": "the settings",
}
READERS = frozenset({"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"})


def reads_environment(name: str) -> list[str]:
    return [f"{name}:{line} os.{used}" for line, used in names_used(parsed(ROOT / name), "os") if used in READERS]


@pytest.mark.parametrize("name", [name for path in python_files("packages") if (name := name_of(path)) not in MAY_READ])
def test_no_other_module_reads_the_environment(name: str) -> None:
    assert reads_environment(name) == []


@pytest.mark.parametrize("name", MAY_READ)
def test_those_that_may_do(name: str) -> None:
    """An exception that nobody needs any more goes."""
    assert reads_environment(name)
