"""The guard for short prompts, in vLLM's own Python with its own PyTorch: a stand-in takes the kernel's place."""

import json
import subprocess
from pathlib import Path

import pytest

from demo.engine import choose_engine
from xim_agent.wrapper import LAUNCH, interpreter_of

pytestmark = pytest.mark.engine
STAND_IN = Path(__file__).with_name("short_prompts_stand_in.py")


def in_vllms_python(question: str, **variables: str) -> dict[str, object]:
    """What the stand-in found, asked `question`."""
    python = interpreter_of(Path(choose_engine().path))
    assert python is not None
    done = subprocess.run(
        [python, str(STAND_IN), question],
        env={"PYTHONPATH": str(LAUNCH.parent), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_short_prompts_give_what_the_recurrence_gives_and_never_reach_the_kernel() -> None:
    found = in_vllms_python("equal")
    assert found["crashes_unguarded"] is True
    cases = found["largest_difference"]
    assert isinstance(cases, dict)
    assert len(cases) == 8
    assert max(cases.values()) < 1e-9


@pytest.mark.parametrize(
    ("switch", "rocm", "guarded"), [("1", "1", True), ("1", "", False), ("", "1", False), ("", "", False)]
)
def test_vllm_itself_loads_the_plugin_which_acts_on_rocm_alone(switch: str, rocm: str, guarded: bool) -> None:
    found = in_vllms_python("loaded", XEROTIER_GDN_ZERO_PAD=switch, STAND_IN_ROCM=rocm)
    assert found["plugin_seen"] is True
    assert found["guarded"] is guarded
    assert found["guarded_again"] is False  # a plugin may be loaded twice


def test_the_kernel_that_vllm_has_is_where_the_guard_looks_for_it() -> None:
    found = in_vllms_python("real")
    assert found["takes"] == ["q", "k", "v", "g", "beta", "cu_seqlens", "chunk_indices", "chunk_offsets"]
