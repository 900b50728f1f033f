"""How an engine on the CPU uses memory and cores."""

from math import ceil

from xim_agent.planning.budget import Budget
from xim_agent.planning.context import CPU_CONCURRENCY
from xim_agent.planning.decision import Decision, Device, Given, Source
from xim_agent.planning.memory import GIB
from xim_agent.planning.operator_words import number_of

KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
BIND = "VLLM_CPU_OMP_THREADS_BIND"
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
PREFIXES_SHARE = 2
"""Times the memory of the most requests at full length: as much again is left for prefixes of earlier ones."""


def choose_cpu_tuning(given: Given, budget: Budget, context: Decision, concurrency: Decision) -> list[Decision]:
    """Everything for the CPU; nothing on a GPU, or where automatic choices are off.

    OMP_PROC_BIND is not among it. vLLM binds the threads of its workers itself; set from outside it also ties the
    server and the scheduler to the first core, all of them to the same one (seen with vLLM 0.32: allowed CPUs `0`
    in place of `0-1` in three of four processes).
    """
    if given.device is not Device.CPU or not given.settings.auto_config:
        return []
    decisions = [_kv_space(given, budget, context, concurrency)]
    if given.hardware.system != "Darwin":  # macOS binds no threads
        ranks = _cores(given, budget.tensor_parallel_size)
        decisions += [_bind(given, ranks), *_threads(given, ranks)]
        reason = f"for the server, where {BIND} is set to auto"
        decisions.append(_variable("reserved CPUs", RESERVED, "1", Source.DEFAULT, reason))
    decisions.append(_variable("OpenMP waiting", "OMP_WAIT_POLICY", "PASSIVE", Source.DEFAULT, "idle threads sleep"))
    return [decision for decision in decisions if decision is not None]


def _kv_space(given: Given, budget: Budget, context: Decision, concurrency: Decision) -> Decision | None:
    """Whole GiB, the only unit that the variable has."""
    if given.words.has("--kv-cache-memory-bytes") or budget.kv_bytes is None or budget.device_bytes is None:
        return None
    tokens = number_of(context.value) or given.model.max_position_embeddings
    left = budget.kv_bytes // GIB
    useful = left
    if tokens is not None:
        requests = max(number_of(concurrency.value) or 0, CPU_CONCURRENCY)
        useful = ceil(budget.sequence_bytes(given, tokens) * requests * PREFIXES_SHARE / GIB)
    size = max(min(left, useful), 1)
    reason = f"{budget.device_bytes / GIB:.1f} GiB less the weights and what the system needs"
    if useful < left:
        reason = f"{PREFIXES_SHARE} times {requests} requests of {tokens} tokens; {left} GiB would be free"
    decision = _variable("KV cache space", KV_SPACE, str(size), Source.HARDWARE, reason, unit=" GiB")
    return decision if left else _warned(decision, "The model leaves no memory for a KV cache: it may be killed.")


def _cores(given: Given, ranks: int) -> list[list[int]]:
    """The CPUs of each rank: a NUMA node each where there are several, no more than the quota. Empty where they are not
    known, or ranks have to share a node, which is left to vLLM."""
    cpu, quota = given.hardware.cpu, given.hardware.cpu_limit
    nodes = [sorted(node.cpus) for node in cpu.numa_nodes or ()] or [list(range(cpu.logical_cpus or 0))]
    if ranks > len(nodes) or not nodes[0]:
        return []
    most = None if quota is None else max(int(quota / ranks), 1)
    return [node[:most] for node in nodes[:ranks]]


def _bind(given: Given, ranks: list[list[int]]) -> Decision | None:
    if not ranks:
        return None
    nodes = len(given.hardware.cpu.numa_nodes or ())
    reason = "all CPUs that the process may use"
    if nodes > 1:
        what = "the first" if len(ranks) == 1 else f"{len(ranks)}, one for each rank,"
        reason = f"{what} of {nodes} NUMA nodes, since vLLM keeps one rank's memory on one"
    if given.hardware.cpu_limit is not None:
        reason += f", within a quota of {given.hardware.cpu_limit:g}"
    return _variable("thread binding", BIND, "|".join(map(as_ranges, ranks)), Source.HARDWARE, reason)


def _threads(given: Given, ranks: list[list[int]]) -> list[Decision]:
    cpu = given.hardware.cpu
    physical = None if cpu.physical_cores is None else cpu.physical_cores // len(cpu.numa_nodes or (None,))
    if not ranks:
        return []
    count = len(ranks[0]) if physical is None else min(physical, len(ranks[0]))
    # `OMPProcessManager.configure_omp_envs` sets the number anew for its workers.
    reason = "physical cores; vLLM gives a bound worker one for each of its CPUs"
    return [_variable("OpenMP threads", "OMP_NUM_THREADS", str(max(count, 1)), Source.HARDWARE, reason)]


def as_ranges(numbers: list[int]) -> str:
    """`0-3,8-11` for the sorted `numbers`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _variable(option: str, name: str, value: str, source: Source, reason: str, *, unit: str = "") -> Decision:
    return Decision(option=option, value=value + unit, source=source, reason=reason, environment=((name, value),))


def _warned(decision: Decision, warning: str) -> Decision:
    return Decision(
        option=decision.option,
        value=decision.value,
        source=decision.source,
        reason=decision.reason,
        environment=decision.environment,
        warning=warning,
    )
