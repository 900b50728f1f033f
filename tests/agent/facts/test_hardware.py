"""A machine as JSON: what goes out comes back, and what is wrong is named."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.house.sources import ROOT
from xim_agent.facts.hardware import REFERENCE, CpuFacts, GpuFacts, HardwareFacts, HardwareUnreadable, NumaNode, Vendor

MACHINES = sorted((Path(__file__).parents[1] / "machines").glob("*.json"))
GIB = 1024**3

gpus = st.builds(
    GpuFacts,
    name=st.text(),
    vendor=st.sampled_from(Vendor),
    memory_bytes=st.none() | st.integers(1, 1 << 60),
    compute_capability=st.none() | st.tuples(st.integers(1, 99), st.integers(0, 99)),
    architecture=st.none() | st.text(),
    mig=st.booleans(),
    index=st.none() | st.integers(0, 99),
    uuid=st.none() | st.text(),
)
cpus = st.builds(
    CpuFacts,
    model=st.none() | st.text(),
    physical_cores=st.none() | st.integers(1, 999),
    flags=st.none() | st.lists(st.text(), max_size=3).map(tuple),
    numa_nodes=st.none()
    | st.lists(st.builds(NumaNode, node=st.integers(0, 9), cpus=st.just((0, 1))), max_size=2).map(tuple),
)
machines = st.builds(
    HardwareFacts,
    gpus=st.lists(gpus, max_size=3).map(tuple),
    cpu=cpus,
    ram_bytes=st.none() | st.integers(1, 1 << 60),
    cpu_limit=st.none() | st.floats(0.01, 1000),
    disk_free_bytes=st.none() | st.integers(0, 1 << 60),
    shm_free_bytes=st.none() | st.integers(0, 1 << 60),
    problems=st.lists(st.text(), max_size=2).map(tuple),
)


@given(machines)
def test_a_machine_survives_the_way_through_json(machine: HardwareFacts) -> None:
    assert HardwareFacts.from_json(json.dumps(machine.to_json())) == machine


@pytest.mark.parametrize("file", MACHINES, ids=lambda file: file.stem)
def test_every_described_machine_can_be_read(file: Path) -> None:
    machine = HardwareFacts.from_json(file.read_bytes())
    assert machine.usable_ram_bytes
    assert machine.cpu.physical_cores
    assert all(gpu.memory_bytes for gpu in machine.gpus)


def test_fifteen_machines_are_described() -> None:
    assert len(MACHINES) == 15


@pytest.mark.parametrize("written", ['"8.6"', "8.6", "[8, 6]"])
def test_a_compute_capability_may_be_written_as_people_write_it(written: str) -> None:
    text = f'{{"gpus": [{{"name": "g", "vendor": "nvidia", "compute_capability": {written}}}]}}'
    assert HardwareFacts.from_json(text).gpus[0].compute_capability == (8, 6)


def test_every_fault_of_a_description_is_named_at_once() -> None:
    text = '{"gpus": [{"name": 1, "vendor": "intel", "memory": 5, "compute_capability": true}], "ram_bytes": 0}'
    with pytest.raises(HardwareUnreadable) as fault:
        HardwareFacts.from_json(text)
    for place in ("gpus.0.name", "gpus.0.vendor", "gpus.0.memory", "gpus.0.compute_capability", "ram_bytes"):
        assert place in str(fault.value)


def test_a_fault_is_answered_with_the_page_that_lists_every_field() -> None:
    with pytest.raises(HardwareUnreadable, match="plan --json") as fault:
        HardwareFacts.from_json("{}x")
    assert REFERENCE in str(fault.value)
    page = (ROOT / REFERENCE).read_text(encoding="utf-8")
    for kind in (HardwareFacts, GpuFacts, CpuFacts, NumaNode):
        assert [field.name for field in dataclasses.fields(kind) if f"| `{field.name}` | " not in page] == []


@pytest.mark.parametrize("text", ["", "[]", "null", '{"gpus": 3}', "\x00"])
def test_what_is_no_machine_is_refused(text: str) -> None:
    with pytest.raises(HardwareUnreadable, match="does not describe a machine"):
        HardwareFacts.from_json(text)


def test_the_smaller_of_machine_and_control_group_counts() -> None:
    machine = HardwareFacts(ram_bytes=96 * GIB, ram_limit_bytes=8 * GIB, cpu_limit=1.5, cpu=CpuFacts(logical_cpus=96))
    assert (machine.usable_ram_bytes, machine.usable_cpus) == (8 * GIB, 1.5)


def test_what_is_not_known_is_not_guessed() -> None:
    machine = HardwareFacts()
    assert (machine.usable_ram_bytes, machine.usable_cpus, machine.cpu.has("avx2")) == (None, None, None)


def test_a_cpu_knows_its_flags() -> None:
    cpu = CpuFacts(flags=("avx2",))
    assert (cpu.has("avx2"), cpu.has("avx512f")) == (True, False)
