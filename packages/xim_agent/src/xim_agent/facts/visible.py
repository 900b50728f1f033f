"""Which accelerators a visibility mask leaves, as CUDA and HIP read it. Pure."""

from collections.abc import Sequence

from xim_agent.facts.hardware import GpuFacts


def visible(devices: Sequence[GpuFacts], mask: str | None, variable: str) -> tuple[tuple[GpuFacts, ...], str | None]:
    """The devices of `devices` that `mask` leaves, in its order, and what is wrong with it if something is.

    `None` leaves all; an empty mask or `-1` none. An entry is a number or the beginning of a UUID. As in the drivers,
    the first entry that names no device ends the list, and so does one that was named before.
    """
    if mask is None:
        return _enumerable(devices), None
    chosen: list[GpuFacts] = []
    for entry in (part.strip() for part in mask.split(",")):
        if entry in {"", "-1", "NoDevFiles"}:
            break
        device = _named(devices, entry)
        if device is None:
            return _enumerable(chosen), (
                f"{variable}={mask}: {entry[:40]} names none of the {len(devices)} devices of this machine, so it and "
                "what follows it are not used. Name devices by their number from 0 or by their UUID."
            )
        if device in chosen:
            return _enumerable(chosen), f"{variable}={mask}: {entry[:40]} is named twice. Name every device once."
        chosen.append(device)
    return _enumerable(chosen), None


def _named(devices: Sequence[GpuFacts], entry: str) -> GpuFacts | None:
    """The device of a number, or the only one whose UUID begins with `entry`."""
    if entry.isdecimal():
        return next((device for device in devices if device.index == int(entry)), None)
    matching = [device for device in devices if device.uuid is not None and device.uuid.startswith(entry)]
    return matching[0] if len(matching) == 1 else None


def _enumerable(devices: Sequence[GpuFacts]) -> tuple[GpuFacts, ...]:
    """What one process can use: a single MIG slice where there is one, and then no whole GPU beside it.

    From "CUDA Device Enumeration" in NVIDIA's MIG user guide.
    """
    slices = [device for device in devices if device.mig]
    return (slices[0],) if slices else tuple(devices)
