"""The operator's own arguments of `vllm serve`, read as vLLM reads them: the last one wins."""

import re
from dataclasses import dataclass

_SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpl": "--data-parallel-size-local",
    "-ep": "--enable-expert-parallel",
    "-q": "--quantization",
    "-sc": "--speculative-config",
    "--device-memory-utilization": "--gpu-memory-utilization",
}
"""Other names of flags that a plan decides on."""
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)([kmgKMG]?)")
"""No longer: nothing that vLLM counts has so many digits, and a sum with it would be no number."""
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
"""vLLM's: small letters are decimal, capitals binary."""


@dataclass(frozen=True, slots=True)
class OperatorWords:
    """Arguments as they stand in VLLM_ARGS."""

    words: tuple[str, ...]

    def has(self, flag: str) -> bool:
        """Whether `flag` is among them, in any of its spellings; a switch counts when it is denied as well."""
        return any(name == flag for name, _ in self._pairs())

    def value(self, flag: str) -> str | None:
        """The last value of `flag`; empty for a switch, `None` where it is not there."""
        found = [value for name, value in self._pairs() if name == flag]
        return found[-1] if found else None

    def _pairs(self) -> list[tuple[str, str]]:
        """Each flag with the words after it, in order."""
        pairs: list[tuple[str, str]] = []
        for word in self.words:
            if re.match(r"-+[a-zA-Z]", word):
                name, _, value = word.partition("=")
                # `--speculative-config.method` is one key of a JSON value.
                pairs.append((_canonical(name.partition(".")[0]), value))
            elif pairs:
                name, value = pairs[-1]
                pairs[-1] = (name, f"{value} {word}".strip())
        return pairs


def number_of(text: str) -> int | None:
    """A whole number as vLLM's arguments spell it, `8192`, `8k` or `8K`; `None` for anything else, such as `auto`."""
    matched = _SIZE.fullmatch(text)
    return None if matched is None else int(float(matched[1]) * _FACTORS[matched[2]])


def _canonical(name: str) -> str:
    name = _SHORT.get(name, name.replace("_", "-"))
    return "--" + name.removeprefix("--no-") if name.startswith("--no-") else name
