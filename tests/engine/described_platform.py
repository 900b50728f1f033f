"""Runs in vLLM's Python: which configuration vLLM makes of command lines on GPUs that are only described.

Reads `{"gpu": {"name", "memory_bytes", "capability", "count"}, "plans": {name: [model, flag, ...]}}`, prints one JSON
object with what it derives for every plan, or why it refuses it. Kernels, and libraries that are not there, are
stand-ins: what decides about a configuration is vLLM's own code.
"""

import importlib.machinery
import json
import sys
import types
from typing import Any
from unittest.mock import MagicMock

WITHOUT_GPU = (
    *("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch"),
    *("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"),
    *("vllm.vllm_flash_attn.layers", "vllm.vllm_flash_attn.layers.rotary"),
)
TORCHVISION = tuple(
    f"torchvision{part}"
    for part in ("", ".io", ".tv_tensors", ".transforms", ".transforms.v2", ".transforms.functional")
)


class StandIn(types.ModuleType):
    """A module that has everything and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class Kernels:
    """A namespace of operators that has those that the build lacks as well."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.real, name)
        except AttributeError:
            return MagicMock(name=name, return_value=True)


def put(names: tuple[str, ...]) -> None:
    """Make modules of these names importable."""
    for name in names:
        module = StandIn(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module


def stand_in() -> None:
    """Everything that a build for the CPU lacks and that configuring for a GPU imports."""
    put(WITHOUT_GPU)
    import torch  # type: ignore[import-not-found]

    for name in ("_C", "_moe_C", "_C_cache_ops", "_C_custom_ar", "_C_cuda_utils"):
        setattr(torch.ops, name, Kernels(getattr(torch.ops, name)))
    registered = torch.library.register_fake

    def register_where_it_is(*arguments: Any, **more: Any) -> Any:
        decorate = registered(*arguments, **more)

        def decorated(function: Any) -> Any:
            try:
                return decorate(function)
            except RuntimeError:
                return function

        return decorated

    torch.library.register_fake = register_where_it_is


def describe(gpu: dict[str, Any]) -> None:
    """Make vLLM's platform the described one."""
    import torch
    import vllm.platforms  # type: ignore[import-not-found]
    from vllm.platforms.cuda import NonNvmlCudaPlatform  # type: ignore[import-not-found]
    from vllm.platforms.interface import DeviceCapability  # type: ignore[import-not-found]

    major, minor = gpu["capability"]

    class Described(NonNvmlCudaPlatform):  # type: ignore[misc]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(major, minor)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return str(gpu["name"])

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return int(gpu["memory_bytes"])

        @classmethod
        def device_count(cls) -> int:
            return int(gpu["count"])

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return False

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 100

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return True

        @classmethod
        def get_cuda_runtime_major(cls) -> int:
            return 13

    vllm.platforms._current_platform = Described()
    torch.cuda.device_count = lambda: gpu["count"]
    torch.cuda.get_device_capability = lambda *_: (major, minor)


def inspect_here_where_a_process_cannot() -> None:
    """vLLM looks at a model's class in a process of its own, which lacks the stand-ins."""
    import vllm.model_executor.models.registry as registry  # type: ignore[import-not-found]
    from transformers import AutoConfig, Qwen2Config  # type: ignore[import-not-found]
    from vllm.triton_utils import triton  # type: ignore[import-not-found]

    apart = registry._run_in_subprocess

    def inspect(function: Any) -> Any:
        try:
            return apart(function)
        except RuntimeError:
            put(TORCHVISION)  # not before: Transformers would take it to be there
            triton.Config = lambda kwargs=None, **more: types.SimpleNamespace(
                kwargs=kwargs, **{"num_stages": 1, **more}
            )
            return function()

    registry._run_in_subprocess = inspect

    class MiMoConfig(Qwen2Config):  # type: ignore[misc]
        """In place of the code that MiMo's checkpoints bring for their configuration."""

        model_type = "mimo"

        def __init__(self, num_nextn_predict_layers: int = 0, **more: Any) -> None:
            super().__init__(**more)
            self.num_nextn_predict_layers = num_nextn_predict_layers

    AutoConfig.register("mimo", MiMoConfig)


def configured(argv: list[str]) -> dict[str, Any]:
    """What vLLM derives from one command line."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
    from vllm.entrypoints.launchers.cli_args import (  # type: ignore[import-not-found]
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.usage.usage_lib import UsageContext  # type: ignore[import-not-found]
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found]

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    validate_parsed_serve_args(arguments)
    arguments.model = arguments.model_tag
    arguments.skip_tokenizer_init = True  # no tokenizer stands beside these descriptions
    made = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
    model, cache = made.model_config, made.cache_config
    fp8 = "fp8" in str(cache.cache_dtype)
    heads = 1 if model.use_mla else 2 * model.get_num_kv_heads(made.parallel_config)
    return {
        "tensor_parallel_size": made.parallel_config.tensor_parallel_size,
        "max_model_len": model.max_model_len,
        "max_num_seqs": made.scheduler_config.max_num_seqs,
        "quantized": model.quantization is not None,
        "pooling": model.runner_type == "pooling",
        "eager": bool(model.enforce_eager),
        "offload_gib": cache.kv_offloading_size,
        "guessed_tokens": made.speculative_config.num_speculative_tokens if made.speculative_config else 0,
        "layer_token_bytes": heads * model.get_head_size() * (1 if fp8 else model.dtype.itemsize),
        "batch": made.scheduler_config.max_num_batched_tokens,
    }


def main() -> None:
    asked = json.load(sys.stdin)
    stand_in()
    describe(asked["gpu"])
    inspect_here_where_a_process_cannot()
    derived: dict[str, Any] = {}
    for name, argv in asked["plans"].items():
        try:
            derived[name] = configured(argv)
        except (SystemExit, Exception) as error:
            derived[name] = {"refused": str(error)}
    print("derived", json.dumps(derived))  # noqa: T201


if __name__ == "__main__":
    main()
