"""What the machine has, for people."""

from __future__ import annotations

from pyengine.cli.screen import show, show_columns, size
from pyengine.hardware import detect
from pyengine.hardware.facts import CoreKind, Device, Hardware

__all__ = ["detect", "show_hardware"]


def show_hardware(found: Hardware) -> None:
    """Print what was detected, and what is assumed where it could not be."""
    memory, cpu = found.memory, found.cpu
    rows = [("cpu", f"{cpu.name}, {cpu.architecture}"),
            *(("cores", _cores(kind, len(cpu.kinds) > 1)) for kind in cpu.kinds),
            ("threads", f"{cpu.n_threads} by default (--threads)"),
            *([] if cpu.quota is None else [("quota", f"{cpu.quota:g} processors, by control group")]),
            ("instructions", ", ".join(cpu.isas)),
            *((f"L{c.level} cache", size(c.nbytes) + f" x {c.n_instances}" * (c.n_instances > 1)) for c in cpu.caches),
            ("memory", f"{size(memory.total)}, {size(memory.available)} available")]
    if memory.limit is not None:
        rows.append(("limit", f"{size(memory.limit)} by control group, {size(memory.limit_used or 0)} of it used"))
    if len(found.numa) > 1:
        rows += [(f"node {n.index}", f"{size(n.total)}, {size(n.free)} free, {len(n.cpus)} logical CPUs")
                 for n in found.numa]
    show_columns(rows)
    show("\nDevices")
    show_columns([(f"  {d.id}", d.name, size(d.total), f"{size(d.free)} free", _about(d)) for d in found.devices],
                 right=(2, 3))
    for note in found.notes:
        show(f"\n{note}")


def _cores(kind: CoreKind, named: bool) -> str:
    facts = [f"{kind.n_cores} {kind.kind}" if named else f"{kind.n_cores}"]
    if kind.n_cpus != kind.n_cores:
        facts.append(f"{kind.n_cpus} logical CPUs")
    if kind.max_mhz:
        facts.append(f"up to {kind.max_mhz / 1000:.2f} GHz")
    if kind.n_usable != kind.n_cores:
        facts.append(f"{kind.n_usable} for this process")
    return ", ".join(facts)


def _about(device: Device) -> str:
    facts = [device.compute, device.pci, "MIG instance" if device.parent else None,
             "shares the CPU's memory" if device.unified else None,
             None if device.host is None else f"and {size(device.host)} of main memory"]
    return ", ".join(fact for fact in facts if fact)
