"""What an ended engine died of, read from its last lines and its status, and what the operator does about it. Pure.

The wording is vLLM's, PyTorch's and the drivers' as of vLLM 0.32; what is not recognised keeps its last lines, which
are logged in any case.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

SIGKILLED = 128 + 9
"""The status of an engine that SIGKILL ended."""


class Trouble(StrEnum):
    """Why an engine ended."""

    GPU_MEMORY = "gpu_memory"
    KV_MEMORY = "kv_memory"
    CPU_KV_SPACE = "cpu_kv_space"
    HOST_MEMORY = "host_memory"
    KILLED = "killed"
    MODEL_NOT_FOUND = "model_not_found"
    WEIGHTS_CORRUPT = "weights_corrupt"
    TOKENIZER = "tokenizer"
    MODEL_UNKNOWN = "model_unknown"
    NO_GPU = "no_gpu"
    DISK_FULL = "disk_full"
    NOT_PERMITTED = "not_permitted"
    BAD_OPTION = "bad_option"


FINAL = frozenset(
    {
        Trouble.MODEL_NOT_FOUND,
        Trouble.WEIGHTS_CORRUPT,
        Trouble.TOKENIZER,
        Trouble.MODEL_UNKNOWN,
        Trouble.NO_GPU,
        Trouble.NOT_PERMITTED,
        Trouble.BAD_OPTION,
    }
)
"""Another start would only repeat these; the others pass when memory or disk is given back."""

GPU_CHECKS = (
    "Check in this order: does `nvidia-smi` (AMD: `rocm-smi`) list it on the host; is the container toolkit installed: "
    "`docker run --rm --gpus all nvidia/cuda:12.1-base-ubuntu22.04 nvidia-smi`; does `docker info | grep -i runtime` "
    "name its runtime; is the GPU passed into the container (--gpus all, or --device /dev/kfd --device /dev/dri); does "
    "XEROTIER_AGENT_CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES hide it"
)
"""What to look at when no GPU is seen."""

GPU_LEVERS = (
    "Lower XEROTIER_AGENT_GPU_MEMORY_UTILIZATION to 0.85 or less, lower XEROTIER_AGENT_MAX_CONCURRENT and "
    "XEROTIER_AGENT_MAX_NUM_SEQS, shorten XEROTIER_AGENT_MAX_MODEL_LEN, or use a smaller model or more GPUs "
    "(XEROTIER_AGENT_TENSOR_PARALLEL_SIZE); `xerotier-xim-agent plan` shows the estimate by component"
)
KV_LEVERS = (
    "Shorten XEROTIER_AGENT_MAX_MODEL_LEN, raise XEROTIER_AGENT_GPU_MEMORY_UTILIZATION where nothing else uses the "
    "memory, or use a smaller or quantised model (XEROTIER_AGENT_VLLM_QUANTIZATION) or more GPUs"
)
HOST_LEVERS = (
    "Lower XEROTIER_AGENT_KV_OFFLOAD_SIZE_GB (0 is off) and, on a CPU, the KV cache: "
    'XEROTIER_AGENT_VLLM_ENV="VLLM_CPU_KVCACHE_SPACE=<GB>"; lower XEROTIER_AGENT_MAX_CONCURRENT, use a smaller model, '
    "or give the machine or the container more memory"
)

_MODEL_REMEDY = (
    "Check the model's name at the endpoint, or that XEROTIER_AGENT_INITIAL_MODEL_PATH is a directory with config.json "
    "and weights in Hugging Face's layout"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What happened, in words, and what to do."""

    trouble: Trouble
    reason: str
    remedy: str

    @property
    def final(self) -> bool:
        """Whether another start would only repeat it."""
        return self.trouble in FINAL

    @property
    def lasting(self) -> bool:
        """Whether only another setting mends it; the rest of `FINAL` may pass with a late disk or driver."""
        return self.trouble in (Trouble.BAD_OPTION, Trouble.MODEL_UNKNOWN)


@dataclass(frozen=True, slots=True)
class _Sign:
    """A line that gives a trouble away. The first group of `pattern`, if it has one, is told."""

    trouble: Trouble
    pattern: re.Pattern[str]
    reason: str
    remedy: str


def _sign(trouble: Trouble, pattern: str, reason: str, remedy: str) -> _Sign:
    return _Sign(trouble, re.compile(pattern), reason, remedy)


_SIGNS: tuple[_Sign, ...] = (
    _sign(
        Trouble.DISK_FULL,
        r"No space left on device|Disk quota exceeded|\[Errno (?:28|122)\]",
        "a disk is full",
        "Free space, raise the disk, or lower XEROTIER_AGENT_MODEL_CACHE_MAX_SIZE_GB; `df -h` names the disk, and a "
        "full /dev/shm is cured by a larger SHM_SIZE",
    ),
    _sign(
        Trouble.CPU_KV_SPACE,
        r"(Available memory on node \d+ \([^)]*\))|Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE",
        "the memory does not hold the KV cache asked for",
        HOST_LEVERS,
    ),
    _sign(
        Trouble.GPU_MEMORY,
        r"(?:CUDA|HIP) out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|NCCL.*out of memory"
        r"|(?:CUDA|HIP) error: out of memory",
        "the GPU ran out of memory",
        GPU_LEVERS,
    ),
    _sign(
        Trouble.GPU_MEMORY,
        r"(Free memory on device \S+ \([^)]*\)) on startup is less",
        "another process holds the GPU's memory, or too much of it is asked for",
        "Stop the other process (`nvidia-smi` names it). " + GPU_LEVERS,
    ),
    _sign(
        Trouble.KV_MEMORY,
        r"To serve at least one request with the model's max seq len(?:.*(the estimated maximum model length is \d+))?"
        r"|No available memory for the cache blocks",
        "no memory is left for the KV cache of one request",
        KV_LEVERS,
    ),
    _sign(
        Trouble.HOST_MEMORY,
        r"DefaultCPUAllocator: can't allocate|std::bad_alloc|Cannot allocate memory|^(?:\S+ )*MemoryError\b",
        "the machine ran out of memory",
        HOST_LEVERS,
    ),
    _sign(
        Trouble.NO_GPU,
        r"Failed to infer device type|No CUDA GPUs are available|Found no NVIDIA driver|no CUDA-capable device"
        r"|no ROCm-capable device|CUDA driver version is insufficient|NVML: Driver Not Loaded"
        r"|Failed to initialize NVML|No HIP GPUs are available",
        "vLLM sees no GPU",
        GPU_CHECKS,
    ),
    _sign(
        Trouble.WEIGHTS_CORRUPT,
        r"SafetensorError: (.*)|(Error while deserializing header.*)|(InvalidHeader\w*|MetadataIncompleteBuffer)"
        r"|OverflowError: cannot fit 'int' into an index-sized integer|PytorchStreamReader failed"
        r"|(Cannot find any model weights)|Following weights were not initialized from checkpoint",
        "the model's weights are damaged or incomplete",
        "Copy the model again and compare its checksums; what the agent pulled itself is pulled anew when its "
        "directory in the model cache is removed",
    ),
    _sign(
        Trouble.MODEL_NOT_FOUND,
        r"Invalid repository ID or local directory specified: ('[^']*')"
        r"|HFValidationError: Repo id must be .*: ('[^']*')"
        r"|(\S+ does not appear to have a file named config\.json)|LocalEntryNotFoundError|OfflineModeIsEnabled",
        "the model is not there",
        _MODEL_REMEDY,
    ),
    _sign(
        Trouble.MODEL_UNKNOWN,
        r"(Model architectures \[[^]]*\]) (?:are not supported|failed to be inspected)"
        r"|(Transformers does not recognize this architecture)|(Unknown quantization method: \S+)"
        r"|(The quantization method \S+ is not supported[^.]*)",
        "this vLLM cannot run the model",
        "Use a newer vLLM (XEROTIER_AGENT_VLLM_PATH), or a model of its list of supported ones; a quantisation that "
        "this GPU lacks is changed by XEROTIER_AGENT_VLLM_QUANTIZATION",
    ),
    _sign(
        Trouble.MODEL_UNKNOWN,
        r"contains custom code which must be executed|Failed to load the (?:model config|tokenizer)\. If the",
        "the model needs code of its own, which is not trusted",
        "If you trust whoever made the model: --trust-remote-code in XEROTIER_AGENT_VLLM_ARGS; else a newer vLLM "
        "(XEROTIER_AGENT_VLLM_PATH) may know it",
    ),
    _sign(
        Trouble.NOT_PERMITTED,
        r"(?:PermissionError: \[Errno 13\] Permission denied|OSError: \[Errno 30\] Read-only file system): ('[^']*')",
        "the engine may not use a file",
        "Give it to the user that runs the agent: sudo chown -R {owner} <directory>",
    ),
    _sign(
        Trouble.TOKENIZER,
        # What is wrong with a broken file is said in the file format's words alone; where, by the traceback.
        r"Couldn't instantiate the backend tokenizer|Can't load tokenizer for ('[^']*')"
        r"|File \"\S*/vllm/tokenizers/\S+\", line \d+, in (?:get_tokenizer|from_pretrained)",
        "the model's tokenizer is missing or cannot be read",
        "Copy the tokenizer's files (tokenizer.json, tokenizer_config.json, or tokenizer.model) beside the weights "
        "again, or name another one: --tokenizer in XEROTIER_AGENT_VLLM_ARGS",
    ),
)
"""Most telling first: a full disk breaks weights, and an ended worker breaks whoever waits for it."""

_USAGE_ERROR = re.compile(r"error: (.*)")


def diagnose(
    tail: Sequence[str], status: int | None, *, oom_kills: int = 0, owner: str = "<uid>:<gid>"
) -> Diagnosis | None:
    """What the engine died of, or `None` where nothing is recognised.

    `status` is that of the process, 128 + n for signal n. `oom_kills` is how many processes the kernel killed for
    lack of memory while this engine lived; `owner` is who has to own what the engine writes, as chown takes it.
    """
    for sign in _SIGNS:
        # The last such line is the nearest to the end.
        found = next(filter(None, (sign.pattern.search(line) for line in reversed(tail))), None)
        if found is not None:
            told = next(filter(None, found.groups()), "")
            reason = f"{sign.reason}: {told.strip()}" if told else sign.reason
            return Diagnosis(trouble=sign.trouble, reason=reason, remedy=sign.remedy.format(owner=owner))
    if oom_kills:  # vLLM's own processes see each other's death only: their lines and their status say little
        reason = "the kernel killed one of its processes for lack of memory"
        return Diagnosis(trouble=Trouble.HOST_MEMORY, reason=reason, remedy=HOST_LEVERS)
    return _by_status(tail, status)


def _by_status(tail: Sequence[str], status: int | None) -> Diagnosis | None:
    """What the status alone says."""
    if status == SIGKILLED:
        return Diagnosis(
            trouble=Trouble.KILLED,
            reason="SIGKILL ended it, as the kernel does for lack of memory (`dmesg | grep -i oom` tells)",
            remedy=HOST_LEVERS,
        )
    if status == 2:
        said = next(filter(None, (_USAGE_ERROR.search(line) for line in reversed(tail))), None)
        return Diagnosis(
            trouble=Trouble.BAD_OPTION,
            reason="vLLM does not take one of its options" + (f": {said[1]}" if said else ""),
            remedy="Correct XEROTIER_AGENT_VLLM_ARGS; `vllm serve --help=all` lists what this vLLM takes",
        )
    return None
