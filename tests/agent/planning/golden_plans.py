"""The plans that are kept as text: which they are, and how they are written anew.

    python -m tests.agent.planning.golden_plans --write     write tests/agent/planning/golden/*.txt anew

Read every change like code before it is committed: a wrong flag stops an engine.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.agent.planning.givens import planned, vllm
from xim_agent.planning.decision import Wanted
from xim_agent.planning.plan import EnginePlan
from xim_agent.planning.render import as_text

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A machine, a model, and what is set besides."""

    machine: str
    model: str
    variant: str = ""
    task_mode: str = "generate"
    quantization: str | None = None
    platform: str | None = None
    """In vLLM's version; `+cpu` where the machine has no GPU."""
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "__".join(part for part in (self.machine, self.model, self.variant) if part)

    def plan(self) -> EnginePlan:
        wanted = Wanted(served_name="chat", quantization=self.quantization, task_mode=self.task_mode)
        engine = None if self.platform is None else vllm(self.platform)
        return planned(self.machine, self.model, wanted=wanted, engine=engine, **self.settings)

    @property
    def text(self) -> str:
        return "".join(f"{line.rstrip()}\n" for line in as_text(self.plan()).splitlines())

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.txt"


SPECULATIVE: dict[str, object] = {"SPECULATIVE_ENABLED": "1"}
PAIRS = (
    Pair(machine="rtx-3090", model="llama-3.2-1b-instruct"),
    Pair(machine="rtx-3090", model="llama-3.1-8b"),
    Pair(machine="rtx-3090", model="mammoth-7b-awq"),
    Pair(machine="rtx-3090", model="asclepius-13b-gptq"),
    Pair(machine="rtx-3090", model="gemma-3-27b-it"),
    Pair(machine="rtx-3090", model="bge-base-en-v1.5", variant="embed", task_mode="embed"),
    Pair(machine="a30-x2", model="llama-3.1-8b"),
    Pair(machine="a40-x4", model="mixtral-8x7b"),
    Pair(machine="a40-x4", model="llama-3.1-70b"),
    Pair(machine="l40-x2", model="qwen3-30b-a3b"),
    Pair(machine="l40s", model="gemma-3-27b-it"),
    Pair(machine="l40s", model="qwen3-8b"),
    Pair(machine="l40s", model="qwen3-embedding-0.6b", variant="embed", task_mode="embed"),
    Pair(machine="a100-80g-x4", model="llama-3.1-70b"),
    Pair(machine="a100-80g-x4", model="qwen3-next-80b-a3b"),
    Pair(
        machine="a100-80g-x4",
        model="qwen3-next-80b-a3b",
        variant="qwen3_next_mtp",
        settings={**SPECULATIVE, "SPECULATIVE_METHOD": "qwen3_next_mtp"},
    ),
    Pair(machine="a100-mig-3g.40gb", model="qwen3-8b"),
    Pair(machine="a100-mig-3g.40gb", model="gemma-3-4b-it"),
    Pair(machine="h100-x8", model="deepseek-v3", variant="speculative", settings=SPECULATIVE),
    Pair(machine="h100-x8", model="glm-4.5-air", variant="speculative", settings=SPECULATIVE),
    Pair(machine="h100-x8", model="glm-4.7", variant="speculative", settings=SPECULATIVE),
    Pair(machine="h100-x8", model="llama-3.1-70b-fp8"),
    Pair(machine="h100-x8", model="nemotron-h-56b"),
    Pair(machine="h200", model="gpt-oss-20b"),
    Pair(machine="h200", model="qwen3-30b-a3b-fp8"),
    Pair(machine="h200", model="llama-3.1-70b"),
    Pair(machine="h200", model="qwen3.5-27b", variant="speculative", settings=SPECULATIVE),
    Pair(
        machine="h200",
        model="mimo-7b-base",
        variant="speculative",
        settings={**SPECULATIVE, "SPECULATIVE_NGRAM_FALLBACK": "1", "VLLM_ARGS": "--trust-remote-code"},
    ),
    Pair(machine="mi300x-x8", model="deepseek-v3", platform="+rocm700"),
    Pair(machine="mi300x-x8", model="qwen3.5-35b-a3b", platform="+rocm700"),
    Pair(machine="rx-7900-xtx", model="qwen3-8b", platform="+rocm700"),
    Pair(machine="rx-7900-xtx", model="qwen3.5-9b", platform="+rocm700"),
    Pair(machine="epyc-9454-96gb", model="llama-3.2-1b-instruct"),
    Pair(
        machine="epyc-9454-96gb",
        model="qwen3-8b",
        variant="ngram",
        settings={**SPECULATIVE, "SPECULATIVE_NGRAM_FALLBACK": "1"},
    ),
    Pair(machine="two-core-24gb", model="llama-3.2-1b-instruct"),
    Pair(machine="no-gpu", model="llama-3.1-8b"),
    Pair(machine="no-gpu", model="llama-3.1-8b", variant="vllm-for-cuda", platform=""),
    Pair(machine="laptop", model="qwen3-embedding-0.6b", variant="embed", task_mode="embed"),
)


def write() -> None:
    """Write every text anew, and remove those that are no pair's."""
    for file in FOLDER.glob("*.txt"):
        file.unlink()
    for pair in PAIRS:
        pair.file.write_text(pair.text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
