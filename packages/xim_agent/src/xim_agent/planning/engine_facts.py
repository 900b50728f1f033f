"""What the installed vLLM is and which flags it has; asked by `xim_agent.engine.capabilities`."""

import re
from dataclasses import dataclass

_FLAG = re.compile(r"^\s{1,4}(-[^\s].*)$", re.MULTILINE)
_NAME = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
_VERSION = re.compile(r"(\d+)\.(\d+)")

BITSANDBYTES_LEFT = (0, 28)
"""Since this version bitsandbytes is a plugin of its own (vLLM's pull request 43529)."""
BITSANDBYTES_PLUGIN = "vllm_bnb_plugin"
PACKAGES_OF_INTEREST = ("lmcache", "bitsandbytes", BITSANDBYTES_PLUGIN, "arctic_inference")
"""Modules that an option of the plan needs beside vLLM itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFacts:
    """One installed vLLM; what was not asked or did not answer is `None`, and then everything is taken to be there."""

    version: str | None = None
    flags: frozenset[str] | None = None
    """Of `vllm serve`, with their dashes."""
    fits_context: bool = False
    """Whether `--max-model-len auto` makes it choose the longest context that fits."""
    packages: frozenset[str] | None = None
    """Those of `PACKAGES_OF_INTEREST` that its Python can import."""

    @property
    def on_cpu(self) -> bool:
        """vLLM itself chooses its platform by this word in its version."""
        return self.version is not None and "cpu" in self.version

    @property
    def release(self) -> tuple[int, int] | None:
        """Major and minor version; `None` where the version has another form."""
        matched = _VERSION.match(self.version or "")
        return None if matched is None else (int(matched[1]), int(matched[2]))

    @property
    def has_bitsandbytes(self) -> bool:
        """Whether `--quantization bitsandbytes` works."""
        if self.release is not None and self.release >= BITSANDBYTES_LEFT:
            return self.packages is not None and BITSANDBYTES_PLUGIN in self.packages
        return self.imports("bitsandbytes")

    def has(self, flag: str) -> bool:
        """Whether `vllm serve` takes `flag`."""
        return self.flags is None or flag in self.flags

    def imports(self, package: str) -> bool:
        """Whether its Python has `package`, one of `PACKAGES_OF_INTEREST`."""
        return self.packages is None or package in self.packages


def flags_in(help_text: str) -> frozenset[str]:
    """The flags that a help text of argparse describes, each with its aliases and its denial."""
    return frozenset(name for line in _FLAG.findall(help_text) for name in _NAME.findall(_signature(line)))


def fits_context(help_text: str) -> bool:
    """Whether the help text says that the context's length may be left to vLLM's own measurement."""
    _, found, rest = help_text.partition("--max-model-len MAX_MODEL_LEN")
    described = rest.split("\n  --", 1)[0]
    return bool(found) and "'auto'" in described


def _signature(line: str) -> str:
    """The part of a line before its description, which stands after two spaces and may name other flags."""
    return re.sub(r"\{.*?\}", "", line).split("  ", 1)[0]
