"""What becomes of KV blocks that nobody uses at the moment: prefix caching, offload to memory, LMCache."""

import json

from xim_agent.planning.decision import Decision, Device, Given, PlannedFile, Source
from xim_agent.planning.memory import GIB
from xim_agent.settings import MASK
from xim_agent.settings_types import KvCacheBackend

OPTION = "KV offload"
SIZE_FLAG = "--kv-offloading-size"
BACKEND_FLAG = "--kv-offloading-backend"
TRANSFER_FLAG = "--kv-transfer-config"
OFFLOAD_SHARE = 0.25
"""Of the memory, where the operator names no size."""
SHM_KEPT = GIB
"""Of /dev/shm for the messages between vLLM's processes and NCCL's buffers."""
SHM_LEVERS = "Raise it (SHM_SIZE in compose, --shm-size or --ipc=host), or set XEROTIER_AGENT_KV_OFFLOAD_SIZE_GB lower."
LMCACHE_SHARE = 0.10
"""Of the memory and of the partition, for each of LMCache's tiers."""
LMCACHE_FILE = "lmcache_config.yaml"
LMCACHE_VARIABLE = "LMCACHE_CONFIG_FILE"
LMCACHE_CHUNK_TOKENS = 256
"""LMCache's own default."""
SAME_HASHES = ("PYTHONHASHSEED", "0")
"""LMCache names blocks by Python's own hashes, which scheduler, workers and later starts have to agree on."""
SHARED_TIERS = (
    "LMCache's tiers are shared by all projects on this node: it takes no notice of cache_salt, so the time of an "
    "answer may tell that another project sent the same prompt before."
)
"""LMCache 0.5.6: `vllm_v1_adapter.py`, behind this connector, has no salt; only its multi-process mode has."""
CONNECTOR = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}


def choose_prefix_caching(given: Given) -> Decision:
    """Always on; there is no switch.

    An encoder keeps nothing that could be used again, and vLLM 0.32 does not start one with the flag
    (`HybridKVCacheCoordinator.verify_and_split_kv_cache_groups`).
    """
    if not given.model.layer_count:
        reason = "the model reads a text at once and keeps nothing of it; vLLM does not start it with the flag"
        return Decision(option="prefix caching", value="none", source=Source.MODEL, reason=reason)
    return Decision(
        option="prefix caching",
        value="on",
        source=Source.DEFAULT,
        reason="always: prompts that begin alike are computed once",
        arguments=(("--enable-prefix-caching",),),
    )


def choose_kv_offload(given: Given, workers: int) -> Decision:
    """Where KV blocks go that leave the GPU; `workers` share the model."""
    for flag in (SIZE_FLAG, TRANSFER_FLAG):
        if given.words.has(flag):
            return _off(Source.OPERATOR, f"{flag} in VLLM_ARGS", value="by VLLM_ARGS")
    backend = _backend(given)
    if backend is KvCacheBackend.NONE:
        return _off(Source.OPERATOR, "set by XEROTIER_AGENT_KV_CACHE_BACKEND")
    if given.device is Device.CPU:
        asked = backend is KvCacheBackend.LMCACHE or bool(given.settings.kv_offload_size_gb)
        return _off(
            Source.HARDWARE,
            "on a CPU the KV cache is in the machine's memory already",
            warning="KV offload is set and has no effect on a CPU." if asked else "",
        )
    if given.pooling:
        return _off(Source.MODEL, "not for a model that embeds or scores, whose prompts are computed in one step")
    return _lmcache(given, workers) if backend is KvCacheBackend.LMCACHE else _native(given)


def _backend(given: Given) -> KvCacheBackend:
    """The old switch counts where the new setting is not used."""
    settings = given.settings
    if settings.lmcache_enabled and not settings.is_set("kv_cache_backend"):
        return KvCacheBackend.LMCACHE
    return settings.kv_cache_backend


def _native(given: Given) -> Decision:
    size = given.settings.kv_offload_size_gb
    if size == 0:
        return _off(Source.OPERATOR, "set by XEROTIER_AGENT_KV_OFFLOAD_SIZE_GB")
    if size is None:
        return _native_by_memory(given)
    reason = "set by XEROTIER_AGENT_KV_OFFLOAD_SIZE_GB"
    return _native_of(given, f"{size:g}", Source.OPERATOR, reason, warning=_too_large(given, size))


def _native_by_memory(given: Given) -> Decision:
    """A quarter of the memory, or what shared memory holds where that is less."""
    ram, room = given.hardware.usable_ram_bytes, _shared_room_bytes(given)
    if ram is None:
        return _off(Source.HARDWARE, "the machine's memory is not known")
    whole = int(ram * OFFLOAD_SHARE) // GIB
    if whole < 1:
        return _off(Source.HARDWARE, "a quarter of the memory is less than 1 GiB")
    if room is None or whole * GIB <= room:
        return _native_of(given, str(whole), Source.DEFAULT, f"a quarter of {ram / GIB:.0f} GiB of memory")
    free = f"/dev/shm has {(given.hardware.shm_free_bytes or 0) / GIB:.1f} GiB free"
    if room < GIB:
        warning = f"KV offload is off: {free}, and vLLM offloads to there. {SHM_LEVERS}"
        return _off(Source.HARDWARE, f"{free}, and vLLM offloads to there", warning=warning)
    reason = f"{free}, where vLLM offloads to; a quarter of the memory would be {whole} GiB"
    return _native_of(given, str(room // GIB), Source.HARDWARE, reason)


def _too_large(given: Given, size_gib: float) -> str:
    """What speaks against the operator's size; empty for nothing."""
    ram, room = given.hardware.usable_ram_bytes, _shared_room_bytes(given)
    if ram is not None and size_gib * GIB > ram:
        return f"KV offload of {size_gib:g} GiB is more than the memory of {ram / GIB:.0f} GiB."
    if room is not None and size_gib * GIB > room:
        return f"KV offload of {size_gib:g} GiB does not fit into /dev/shm, so vLLM will refuse it. {SHM_LEVERS}"
    return ""


def _shared_room_bytes(given: Given) -> int | None:
    """What shared memory holds of offloaded blocks; `None` where that is not known, or the device needs none.

    On NVIDIA GPUs vLLM maps a file in /dev/shm and does not start where that is too small (`SharedOffloadRegion`); on
    ROCm every rank has memory of its own (`CPUOffloadingSpec._uses_shared_region`).
    """
    free = given.hardware.shm_free_bytes
    return None if free is None or given.device is not Device.CUDA else max(free - SHM_KEPT, 0)


def _native_of(given: Given, size: str, source: Source, reason: str, *, warning: str = "") -> Decision:
    """vLLM's own. The size is the sum over all GPUs that share the model; the backend without it is an error."""
    if not given.engine.has(SIZE_FLAG):
        return _off(Source.AUTOMATIC, f"this vLLM has no {SIZE_FLAG}")
    backend = ((BACKEND_FLAG, "native"),) if given.engine.has(BACKEND_FLAG) else ()
    return Decision(
        option=OPTION,
        value=f"native, {size} GiB",
        source=source,
        reason=reason,
        arguments=(*backend, (SIZE_FLAG, size)),
        warning=warning,
    )


def _lmcache(given: Given, workers: int) -> Decision:
    """LMCache inside the engine. Where it cannot be had the engine runs without, and the operator is told."""
    missing = _unavailable(given)
    if missing:
        warning = f"LMCache is not used: {missing}. The engine runs without KV offload."
        return _off(Source.AUTOMATIC, f"LMCache is set, but {missing}", warning=warning)
    file = lmcache_file(given, workers)
    variable = "LMCACHE_ENABLED" if given.settings.lmcache_enabled else "KV_CACHE_BACKEND"
    tiers = ["memory", "disk"] + ["Redis"] * (given.settings.lmcache_redis_url is not None)
    return Decision(
        option=OPTION,
        value=f"LMCache: {', '.join(tiers)}",
        source=Source.OPERATOR,
        reason=f"set by XEROTIER_AGENT_{variable}",
        arguments=((TRANSFER_FLAG, json.dumps(CONNECTOR, separators=(",", ":"))),),
        environment=((LMCACHE_VARIABLE, str(file.path)), SAME_HASHES),
        files=(file,),
        warning=SHARED_TIERS,
    )


def _unavailable(given: Given) -> str:
    if not given.engine.has(TRANSFER_FLAG):
        return f"this vLLM has no {TRANSFER_FLAG}"
    if not given.engine.imports("lmcache"):
        return "vLLM's environment has no lmcache"
    if given.model.layers.linear:
        # vLLM turns its hybrid KV cache manager off for this connector, and these models need it.
        return "it cannot hold the state of the model's linear attention layers"
    if given.hardware.usable_ram_bytes is None and given.settings.lmcache_redis_url is None:
        return "the machine's memory is not known"
    return ""


def lmcache_file(given: Given, workers: int) -> PlannedFile:
    """LMCache's configuration: a tier in memory, one on disk, and Redis where the operator names one.

    Each of `workers` reads the file and takes the sizes for itself alone (`LocalCPUBackend`, `LocalDiskBackend`), so it
    gets its part. The other tiers copy through memory: where that is not known LMCache takes its own 5 GiB.
    """
    settings, hardware = given.settings, given.hardware
    disk_gib = float(settings.lmcache_disk_size_gb or 0)
    if settings.lmcache_disk_size_gb is None:
        disk_gib = (hardware.disk_total_bytes or 0) * LMCACHE_SHARE / GIB
    entries: dict[str, object] = {"chunk_size": LMCACHE_CHUNK_TOKENS, "local_cpu": False}
    if hardware.usable_ram_bytes is not None:
        entries["local_cpu"] = True
        entries["max_local_cpu_size"] = _part(hardware.usable_ram_bytes * LMCACHE_SHARE / GIB, workers)
    if disk_gib > 0:
        entries["local_disk"] = f"file://{given.places.lmcache}/"
        entries["max_local_disk_size"] = _part(disk_gib, workers)
    shown = dict(entries)
    if settings.lmcache_redis_url is not None:
        url = settings.lmcache_redis_url.get_secret_value()
        entries["remote_url"] = url
        scheme, sign, _ = url.partition("://")
        shown["remote_url"] = f"{scheme}{sign}{MASK}" if sign else MASK
        entries["remote_serde"] = shown["remote_serde"] = "naive"
    return PlannedFile(path=given.places.config / LMCACHE_FILE, content=_yaml(entries), shown=_yaml(shown))


def _part(gib: float, workers: int) -> float:
    """One worker's, in tenths of a GiB; LMCache reads 0 as none."""
    return max(round(gib / workers, 1), 0.1)


def _yaml(entries: dict[str, object]) -> str:
    """A flat mapping; a JSON scalar is a YAML scalar."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items())


def _off(source: Source, reason: str, *, value: str = "off", warning: str = "") -> Decision:
    return Decision(option=OPTION, value=value, source=source, reason=reason, warning=warning)
