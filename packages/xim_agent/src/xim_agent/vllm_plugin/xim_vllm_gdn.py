"""Pads short prompts before the chunked gated delta rule, whose kernels crash on ROCm for fewer than 64 tokens.

A plugin of vLLM (`vllm.general_plugins`), loaded in each of its processes. It does something only where the agent asks
for it (XEROTIER_GDN_ZERO_PAD=1, set for models with gated delta nets on ROCm) and PyTorch is a ROCm build. A token of
zeros with gate 0 (a decay of 1) and beta 0 leaves the recurrent state as it is, and a causal layer's earlier outputs
do not see it: outputs of the real tokens and the final state are those of the unpadded sequence.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from xim_vllm_hooks import after_import  # type: ignore[import-not-found]  # beside this file

SWITCH = "XEROTIER_GDN_ZERO_PAD"
SHORTEST_TOKENS = 64
KERNEL = "chunk_gated_delta_rule"
KERNEL_MODULES = (
    "vllm.third_party.flash_linear_attention.ops.chunk",  # since 0.20
    "vllm.model_executor.layers.fla.ops.chunk",
)
LAYER_MODULE = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
LAYER = "ChunkGatedDeltaRule"
PER_TOKEN = ("q", "k", "v", "g", "beta")
"""Arguments of shape [B, T, ...]."""

Kernel = Callable[..., tuple[Any, Any]]


def register() -> None:
    """vLLM's entry point: guard the kernel where it is imported, which is with the first model that needs it."""
    if os.environ.get(SWITCH) != "1":
        return
    for name in KERNEL_MODULES:
        after_import(name, guard_module)
    after_import(LAYER_MODULE, guard_layer)


def on_rocm() -> bool:
    """Whether PyTorch, which is imported by now, is a build for ROCm."""
    version = getattr(sys.modules.get("torch"), "version", None)
    return getattr(version, "hip", None) is not None


def guard_module(module: ModuleType) -> None:
    """Put the guard around the module's kernel."""
    if on_rocm() and hasattr(module, KERNEL):
        setattr(module, KERNEL, guarded(getattr(module, KERNEL)))


def guard_layer(module: ModuleType) -> None:
    """AITER's kernel has metadata made for the sequences as they are: with a short one the other kernel is taken."""
    layer = getattr(module, LAYER, None)
    inner = getattr(layer, "forward_aiter_flydsl", None)
    if layer is None or inner is None or not on_rocm():
        return

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        given = inspect.signature(inner).bind(self, *args, **options).arguments
        lengths = lengths_of(given["q"], given.get("cu_seqlens"))
        return self.forward_native(*args, **options) if has_short(lengths) else inner(self, *args, **options)

    layer.forward_aiter_flydsl = forward


def guarded(kernel: Kernel) -> Kernel:
    """`kernel`, which then never sees a sequence of fewer than 64 tokens."""
    signature = inspect.signature(kernel)

    @functools.wraps(kernel)
    def padded(*args: Any, **options: Any) -> tuple[Any, Any]:
        bound = signature.bind(*args, **options)
        given = bound.arguments
        lengths = lengths_of(given["q"], given.get("cu_seqlens"))
        if not has_short(lengths):
            return kernel(*args, **options)
        return _padded_call(kernel, dict(given), lengths)

    return padded


def lengths_of(q: Any, cu_seqlens: Any) -> list[int]:
    """Tokens of each sequence. With `cu_seqlens` this waits for the device; prompts alone come this way."""
    if cu_seqlens is None:
        return [int(q.shape[1])]
    return [int(length) for length in (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()]


def has_short(lengths: list[int]) -> bool:
    """Whether one of them would crash the kernel; a sequence without a token is none."""
    return any(0 < length < SHORTEST_TOKENS for length in lengths)


def _padded_call(kernel: Kernel, given: dict[str, Any], lengths: list[int]) -> tuple[Any, Any]:
    import torch  # type: ignore[import-not-found]  # vLLM's, and imported long ago

    q, cu_seqlens, wanted = given["q"], given.get("cu_seqlens"), given.pop("core_attn_out", None)
    room = [max(length, SHORTEST_TOKENS) if length else 0 for length in lengths]
    starts = [sum(room[:at]) for at in range(len(room) + 1)]
    places = [start + at for start, length in zip(starts, lengths, strict=False) for at in range(length)]
    where = torch.tensor(places, dtype=torch.long, device=q.device)
    for name in PER_TOKEN:
        given[name] = _spread(given[name], where, starts[-1])
    if cu_seqlens is not None:
        given["cu_seqlens"] = torch.tensor(starts, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        # Made for the sequences as they were; without them the kernel makes its own.
        given |= {name: None for name in ("chunk_indices", "chunk_offsets") if name in given}
    output, state = kernel(**given)
    output = _gathered(output, where, q.shape[1])
    if wanted is not None:
        flat = output.reshape(-1)
        wanted.reshape(-1)[: flat.numel()].copy_(flat)
    return output, state


def _spread(tensor: Any, where: Any, tokens: int) -> Any:
    """`tensor` with its tokens at `where` among `tokens`, zeros between them."""
    spread = tensor.new_zeros((tensor.shape[0], tokens, *tensor.shape[2:]))
    spread[:, where] = tensor[:, : where.numel()]
    return spread


def _gathered(tensor: Any, where: Any, tokens: int) -> Any:
    """The tokens at `where`, and zeros up to `tokens` where the input was longer than its sequences."""
    if where.numel() == tokens:
        return tensor[:, where]
    gathered = tensor.new_zeros((tensor.shape[0], tokens, *tensor.shape[2:]))
    gathered[:, : where.numel()] = tensor[:, where]
    return gathered
