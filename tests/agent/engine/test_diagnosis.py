"""What an engine's last lines and its status tell."""

from pathlib import Path

import pytest

from xim_agent.engine.diagnosis import GPU_CHECKS, SIGKILLED, Trouble, diagnose
from xim_agent.engine.oom import oom_kills

CORE = "(EngineCore pid=9) ERROR 11-21 11:42:59 [core.py:1510] "
LAST = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"

TOLD = [
    (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23 GiB",
        Trouble.GPU_MEMORY,
    ),
    ("torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB.", Trouble.GPU_MEMORY),
    (
        "ValueError: Free memory on device cuda:0 (3.1/23.6 GiB) on startup is less than desired GPU memory "
        "utilization (0.95, 22.4 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        Trouble.GPU_MEMORY,
    ),
    (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        Trouble.KV_MEMORY,
    ),
    (
        "ValueError: To serve at least one request with the model's max seq len (4096), (0.01 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (0.0 GiB). Based on the available memory, the estimated "
        "maximum model length is 512. Try increasing",
        Trouble.KV_MEMORY,
    ),
    (
        "ValueError: Available memory on node 0 (7.7/9.09 GiB) on kv cache allocation is less than requested memory "
        "for kv (4000.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory",
        Trouble.CPU_KV_SPACE,
    ),
    (
        "RuntimeError: [enforce fail at cpu.cpp:118] DefaultCPUAllocator: can't allocate memory",
        Trouble.HOST_MEMORY,
    ),
    ("terminate called after throwing an instance of 'std::bad_alloc'", Trouble.HOST_MEMORY),
    (
        "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file "
        "not fully covered",
        Trouble.WEIGHTS_CORRUPT,
    ),
    ("OverflowError: cannot fit 'int' into an index-sized integer", Trouble.WEIGHTS_CORRUPT),
    ("  Value error, Invalid repository ID or local directory specified: '/models/x'.", Trouble.MODEL_NOT_FOUND),
    (
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
        "'/models/x'. Use `repo_type` argument if needed.",
        Trouble.MODEL_NOT_FOUND,
    ),
    ("  Value error, Model architectures ['NewForCausalLM'] are not supported for now.", Trouble.MODEL_UNKNOWN),
    ("RuntimeError: Failed to infer device type, please set the environment variable", Trouble.NO_GPU),
    ("RuntimeError: No CUDA GPUs are available", Trouble.NO_GPU),
    ("OSError: [Errno 28] No space left on device: '/cache/vllm/x'", Trouble.DISK_FULL),
    ("PermissionError: [Errno 13] Permission denied: '/var/lib/inference/.cache'", Trouble.NOT_PERMITTED),
    ("OSError: [Errno 30] Read-only file system: '/var/lib/inference/.cache'", Trouble.NOT_PERMITTED),
    ("ValueError: Couldn't instantiate the backend tokenizer from one of: ", Trouble.TOKENIZER),
    ("OSError: Can't load tokenizer for '/models/x'. If you were trying to load it from 'https://", Trouble.TOKENIZER),
    (  # a broken tokenizer.json: what follows says JSONDecodeError, and not of which file
        '  File "/usr/lib/python3/site-packages/vllm/tokenizers/registry.py", line 265, in get_tokenizer',
        Trouble.TOKENIZER,
    ),
]


@pytest.mark.parametrize(("line", "trouble"), TOLD)
def test_a_line_of_a_traceback_is_recognised_though_it_is_not_the_last(line: str, trouble: Trouble) -> None:
    found = diagnose([CORE + "Traceback (most recent call last):", CORE + line, *["  more"] * 60, LAST], 1)
    assert found is not None
    assert found.trouble is trouble
    assert found.remedy


def test_what_is_not_recognised_is_not_guessed() -> None:
    assert diagnose([LAST], 1) is None
    assert diagnose([], 0) is None
    assert diagnose([], None) is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (TOLD[4][0], "no memory is left for the KV cache of one request: the estimated maximum model length is 512"),
        (TOLD[10][0], "the model is not there: '/models/x'"),
        (TOLD[16][0], "the engine may not use a file: '/var/lib/inference/.cache'"),
    ],
)
def test_the_fact_in_the_line_is_told(line: str, told: str) -> None:
    found = diagnose([line], 1)
    assert found is not None
    assert found.reason == told


def test_memory_is_answered_with_every_lever() -> None:
    found = diagnose([TOLD[0][0]], 1)
    assert found is not None
    levers = ("GPU_MEMORY_UTILIZATION to 0.85", "MAX_CONCURRENT", "MAX_MODEL_LEN", "smaller model", "more GPUs")
    assert [lever for lever in levers if lever not in found.remedy] == []
    host = diagnose([], SIGKILLED)
    assert host is not None
    of_host = ("KV_OFFLOAD_SIZE_GB", 'VLLM_ENV="VLLM_CPU_KVCACHE_SPACE=<GB>"', "smaller model")
    assert [lever for lever in of_host if lever not in host.remedy] == []


def test_the_checks_for_a_gpu_stand_in_order() -> None:
    order = ("nvidia-smi", "docker run --rm --gpus all", "docker info | grep -i runtime", "/dev/kfd", "VISIBLE_DEVICES")
    places = [GPU_CHECKS.index(check) for check in order]
    assert places == sorted(places)


def test_a_kill_by_the_kernel_is_told_from_one_by_hand() -> None:
    by_kernel, by_hand = diagnose([LAST], 0, oom_kills=1), diagnose([LAST], SIGKILLED)
    assert by_kernel is not None
    assert by_kernel.trouble is Trouble.HOST_MEMORY
    assert by_hand is not None
    assert by_hand.trouble is Trouble.KILLED
    assert not by_kernel.final
    assert not by_hand.final


def test_a_wrong_option_is_named() -> None:
    found = diagnose(["usage: vllm serve [-h]", "vllm: error: unrecognized arguments: --fooo"], 2)
    assert found is not None
    assert found.reason.endswith("unrecognized arguments: --fooo")
    assert found.final


def test_the_kernels_count_is_read_where_it_is_kept(tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    assert oom_kills(vmstat) is None
    vmstat.write_text("nr_free_pages 5\noom_kill 3\nother 9\n")
    assert oom_kills(vmstat) == 3
    vmstat.write_text("nr_free_pages 5\n")
    assert oom_kills(vmstat) is None


@pytest.mark.parametrize(
    "raised",
    [
        "ValueError: The repository /models/x contains custom code which must be executed to correctly load the model.",
        "RuntimeError: Failed to load the tokenizer. If the tokenizer is a custom tokenizer not yet available in",
    ],
)
def test_a_tokenizer_that_is_code_is_no_missing_one(raised: str) -> None:
    frame = '  File "/usr/lib/python3/site-packages/vllm/tokenizers/hf.py", line 199, in from_pretrained'
    found = diagnose([frame, raised], 1)
    assert found is not None
    assert found.trouble is Trouble.MODEL_UNKNOWN
    assert "--trust-remote-code" in found.remedy


def test_a_tokenizer_that_may_not_be_read_is_a_matter_of_permission() -> None:
    frame = '  File "/usr/lib/python3/site-packages/vllm/tokenizers/hf.py", line 181, in from_pretrained'
    found = diagnose([frame, "PermissionError: [Errno 13] Permission denied: '/models/x/tokenizer.json'"], 1)
    assert found is not None
    assert found.trouble is Trouble.NOT_PERMITTED
