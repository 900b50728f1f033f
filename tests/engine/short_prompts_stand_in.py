"""Runs in vLLM's Python. Prints one JSON object for the question in the first argument."""

import importlib
import importlib.util
import inspect
import itertools
import json
import os
import sys
from typing import Any

import torch  # type: ignore[import-not-found]  # vLLM's
import xim_vllm_gdn as gdn  # type: ignore[import-not-found]  # by PYTHONPATH

HEADS, KEY, VALUE = 2, 4, 3


def kernel(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: Any = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    chunk_indices: Any = None,
    chunk_offsets: Any = None,
    use_qk_l2norm_in_kernel: bool = False,
    core_attn_out: Any = None,
) -> tuple[Any, Any]:
    """The gated delta rule, token by token; crashes as the kernels on ROCm do."""
    lengths = gdn.lengths_of(q, cu_seqlens)
    if gdn.has_short(lengths):
        raise RuntimeError("a sequence of fewer than 64 tokens")
    assert chunk_indices is None or chunk_indices == lengths, "made for other sequences"
    output, state = recurrence(q, k, v, g, beta, initial_state, cu_seqlens)
    if core_attn_out is not None:
        core_attn_out.reshape(-1)[: output.numel()].copy_(output.reshape(-1))
    return output, state


def recurrence(q: Any, k: Any, v: Any, g: Any, beta: Any, initial: Any, cu_seqlens: Any) -> tuple[Any, Any]:
    """S = exp(g) S; S += beta (v - S k) k^T; o = S q, for every sequence by itself."""
    if cu_seqlens is None:
        bounds = [(row, 0, q.shape[1]) for row in range(q.shape[0])]
    else:
        ends = cu_seqlens.tolist()
        bounds = [(0, start, end) for start, end in itertools.pairwise(ends)]
    output, states = v.new_zeros(v.shape), []
    for number, (row, start, end) in enumerate(bounds):
        state = initial[number].clone() if initial is not None else v.new_zeros((HEADS, VALUE, KEY))
        for at in range(start, end):
            state = state * g[row, at].exp()[:, None, None]
            error = v[row, at] - (state @ k[row, at][:, :, None])[:, :, 0]
            state = state + beta[row, at][:, None, None] * error[:, :, None] * k[row, at][:, None, :]
            output[row, at] = (state @ q[row, at][:, :, None])[:, :, 0]
        states.append(state)
    return output, torch.stack(states)


def inputs(rows: int, tokens: int) -> dict[str, Any]:
    """Random tensors as the layer passes them, in double precision."""
    shape = (rows, tokens, HEADS)
    return {
        "q": torch.randn(*shape, KEY, dtype=torch.float64),
        "k": torch.nn.functional.normalize(torch.randn(*shape, KEY, dtype=torch.float64), dim=-1),
        "v": torch.randn(*shape, VALUE, dtype=torch.float64),
        "g": torch.nn.functional.logsigmoid(torch.randn(*shape, dtype=torch.float64)),
        "beta": torch.randn(*shape, dtype=torch.float64).sigmoid(),
    }


def difference(lengths: list[int], *, rows: int = 0, tail: int = 0, in_place: bool = False) -> float:
    """The largest difference between the guarded kernel and the recurrence, over outputs and states."""
    tokens = sum(lengths)
    given = inputs(rows or 1, tokens + tail)
    ends = None if rows else torch.tensor([sum(lengths[:at]) for at in range(len(lengths) + 1)], dtype=torch.int32)
    initial = torch.randn(rows or len(lengths), HEADS, VALUE, KEY, dtype=torch.float64)
    wanted, states = recurrence(**given, initial=initial, cu_seqlens=ends)
    buffer = torch.full((tokens + 9, HEADS, VALUE), 7.0, dtype=torch.float64) if in_place else None
    metadata = {} if ends is None else {"chunk_indices": lengths, "chunk_offsets": lengths}
    output, final = gdn.guarded(kernel)(
        **given, initial_state=initial, output_final_state=True, cu_seqlens=ends, core_attn_out=buffer, **metadata
    )
    assert output.shape == wanted.shape
    found = [(output - wanted).abs().max(), (final - states).abs().max()]
    if buffer is not None:
        found.append((buffer[:tokens] - wanted[0]).abs().max())
        assert bool((buffer[tokens:] == 7.0).all()), "written beyond the output"
    return float(max(found))


def equal() -> dict[str, object]:
    """Outputs and states with the guard, against the recurrence without it."""
    torch.manual_seed(0)
    try:
        kernel(**inputs(1, 5))
        crashes = False
    except RuntimeError:
        crashes = True
    return {
        "crashes_unguarded": crashes,
        "largest_difference": {
            "one token": difference([1]),
            "just below": difference([63]),
            "just enough": difference([64]),
            "short between long": difference([70, 3, 130, 1, 64]),
            "an empty one": difference([5, 0, 66]),
            "tokens beyond the sequences": difference([5, 66], tail=6),
            "into a buffer": difference([5, 66], in_place=True),
            "rows without bounds": difference([10], rows=3),
        },
    }


def loaded() -> dict[str, object]:
    """Whether vLLM finds the plugin by itself, and what the plugin then does to a module that has the kernel."""
    from importlib.metadata import entry_points

    if os.environ["STAND_IN_ROCM"]:
        torch.version.hip = "6.4"
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(gdn.KERNEL_MODULES[0], None))
    module.chunk_gated_delta_rule = kernel  # type: ignore[attr-defined]
    sys.modules[gdn.KERNEL_MODULES[0]] = module
    importlib.import_module("vllm.plugins").load_general_plugins()
    first = module.chunk_gated_delta_rule
    gdn.register()
    return {
        "plugin_seen": "xim_short_prompts" in {each.name for each in entry_points(group="vllm.general_plugins")},
        "guarded": first is not kernel,
        "guarded_again": module.chunk_gated_delta_rule is not first,
    }


def real() -> dict[str, object]:
    """Which of the arguments that the guard touches vLLM's own kernel has, read from its source."""
    import ast

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = os.path.join(spec.submodule_search_locations[0], *gdn.KERNEL_MODULES[0].split(".")[1:]) + ".py"
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    function = next(each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == gdn.KERNEL)
    names = [argument.arg for argument in function.args.args]
    touched = (*gdn.PER_TOKEN, "cu_seqlens", "chunk_indices", "chunk_offsets")
    return {"takes": [name for name in touched if name in names]}


if __name__ == "__main__":
    inspect.signature(kernel)
    print(json.dumps({"equal": equal, "loaded": loaded, "real": real}[sys.argv[1]]()))  # noqa: T201
