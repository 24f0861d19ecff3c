"""GPUs: NVIDIA's by NVML, AMD's by sysfs, Apple's by sysctl."""

from __future__ import annotations

from typing import Any

from pyengine.hardware.facts import Device, Memory
from pyengine.hardware.system import leading_int, System
from pyengine.records import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as NVML has it."""

    device: Device
    speed: int                       # cores x clock, for the order
    mig: bool                        # it is cut into instances, or about to be
    instances: tuple[Device, ...]


class Nvidia:
    """NVIDIA's GPUs as a CUDA program of this process would see and number them.

    CUDA_VISIBLE_DEVICES takes indices, UUIDs or beginnings of them, and MIG UUIDs; what follows one that is not there
    is not seen, and none is where one comes twice. Without CUDA_DEVICE_ORDER=PCI_BUS_ID index 0 is the fastest: CUDA
    does not say by what measure, so cores x clock stands in for it, and a note says so where GPUs differ. A process
    sees one MIG instance at most, and a GPU in MIG mode only as such. Sources: "CUDA Environment Variables" of the CUDA
    programming guide, "CUDA Device Enumeration" of the MIG user guide; repetition: torch.cuda, which has tried it.
    """

    def __init__(self, system: System, memory: Memory):
        self.system, self.memory = system, memory

    def detect(self) -> list[Device]:
        """Return the visible devices in CUDA's order; none, with a note, where NVML is missing or fails."""
        system = self.system
        driver = any(map(system.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl")))
        if system.platform == "darwin" or system.platform == "linux" and not (driver or system.exists("/dev/dxg")):
            return []                                          # dxg: in WSL, Windows' GPUs of any maker
        try:
            nvml = system.nvml()
        except ImportError:
            if driver:
                system.note("NVIDIA: a driver is here, but its GPUs cannot be asked; pip install nvidia-ml-py")
            else:
                system.note("NVIDIA: GPUs are not looked for here without NVML; pip install nvidia-ml-py")
            return []
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            if driver:
                system.note(f"NVIDIA: the driver's library does not start ({error}); its GPUs are left out")
            return []
        try:
            gpus = [self._gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            system.note(f"NVIDIA: the driver's library failed ({error}); its GPUs are left out")
            return []
        finally:
            nvml.nvmlShutdown()
        return [device._replace(index=i) for i, device in enumerate(self._visible(self._ordered(gpus)))]

    def _gpu(self, nvml: Any, handle: Any) -> Gpu:
        """Ask NVML about one GPU and its instances."""
        def ask(name: str, *arguments: Any, default: Any = None) -> Any:
            try:
                return getattr(nvml, name)(*arguments)
            except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NotFound):
                return default

        def device(handle: Any, **more: Any) -> Device:
            name, uuid = (_text(getattr(nvml, f"nvmlDeviceGet{what}")(handle)) for what in ("Name", "UUID"))
            memory = ask("nvmlDeviceGetMemoryInfo", handle)
            if memory is None:                                                 # GB10 and Jetson: none of their own
                self.system.note(f"NVIDIA: {name} does not say how much memory it has; it is taken to share the CPU's")
                return Device("cuda", name, 0, self.memory.total, self.memory.available, True, uuid=uuid, **more)
            return Device("cuda", name, 0, memory.total, memory.free, uuid=uuid, **more)

        compute = ask("nvmlDeviceGetCudaComputeCapability", handle)
        shared = {"compute": None if compute is None else f"{compute[0]}.{compute[1]}",
                  "pci": _pci(_text(nvml.nvmlDeviceGetPciInfo(handle).busId))}
        whole = device(handle, **shared)
        mig = ask("nvmlDeviceGetMigMode", handle, default=(0, 0))[0] == 1
        instances = []
        for i in range(ask("nvmlDeviceGetMaxMigDeviceCount", handle, default=0) if mig else 0):
            instance = ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, i)   # numbers have gaps
            if instance is not None:
                instances.append(device(instance, parent=whole.uuid, **shared))
        n_cores = ask("nvmlDeviceGetNumGpuCores", handle, default=0)
        clock = ask("nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM, default=0)
        return Gpu(whole, n_cores * clock, mig, tuple(instances))

    def _ordered(self, gpus: list[Gpu]) -> list[Gpu]:
        gpus = sorted(gpus, key=lambda g: g.device.pci or "")
        if self.system.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
            return gpus
        if len({g.device.name for g in gpus}) > 1:
            self.system.note("NVIDIA: GPUs differ; CUDA's fastest-first order is taken to be by cores x clock "
                             "(CUDA_DEVICE_ORDER=PCI_BUS_ID makes it certain)")
        return sorted(gpus, key=lambda g: -g.speed)                            # stable: equal ones stay in PCI's order

    def _visible(self, gpus: list[Gpu]) -> list[Device]:
        """Return what CUDA_VISIBLE_DEVICES leaves, of MIG instances one."""
        wanted = self.system.environ.get("CUDA_VISIBLE_DEVICES")
        setting = f"NVIDIA: CUDA_VISIBLE_DEVICES={wanted}"
        if wanted is None:
            chosen = [g.device for g in gpus if not g.mig] or [i for g in gpus for i in g.instances[:1]]
        else:
            chosen = []
            for item in wanted.split(","):
                device = self._named(item.strip(), gpus)
                if device is None:
                    if wanted.strip() and item.strip() != "-1":
                        self.system.note(f"{setting}: there is no {item.strip()!r}; what follows is not seen either")
                    break
                if device in chosen:
                    self.system.note(f"{setting}: {item.strip()} comes twice, so no GPU is seen")
                    return []
                chosen.append(device)
        seen = chosen[:1] if chosen and chosen[0].parent else [d for d in chosen if d.parent is None]
        n_instances = sum(len(g.instances) for g in gpus)
        if n_instances > sum(d.parent is not None for d in seen):
            self.system.note(f"NVIDIA: a process sees one of the {n_instances} MIG instances at most; "
                             "CUDA_VISIBLE_DEVICES names it")
        return seen

    def _named(self, item: str, gpus: list[Gpu]) -> Device | None:
        """Return what one item of CUDA_VISIBLE_DEVICES means; None if it means nothing here."""
        if item.startswith("MIG-"):                                            # MIG-GPU-<uuid>/<gi>/<ci> before R470
            found = [i for g in gpus for i in g.instances if (i.uuid or "").startswith(item)]
        elif item.startswith("GPU-"):
            found = [self._whole(g) for g in gpus if (g.device.uuid or "").startswith(item)]
        else:
            index = leading_int(item.removeprefix("+"))                        # as strtoul reads: "1gpu" is 1
            found = [self._whole(gpus[index])] if index is not None and index < len(gpus) else []
        return found[0] if len(found) == 1 else None

    def _whole(self, gpu: Gpu) -> Device | None:
        return gpu.device if not gpu.mig else gpu.instances[0] if gpu.instances else None


class Amd:
    """AMD's GPUs by the files of the driver amdgpu, in the order of ROCm's topology (kfd), else of PCI addresses.

    total and free are of the memory on board (on an APU: what the firmware sets aside); `host` is GTT, main memory that
    the GPU can map. All cards are listed: HIP_VISIBLE_DEVICES and partitions of MI300 are not looked at. Linux:
    Documentation/gpu/amdgpu/driver-misc.rst (since 5.1).
    """

    def __init__(self, system: System):
        self.system = system

    def detect(self) -> list[Device]:
        """Return the cards whose driver says how much memory they have."""
        system, found, nodes = self.system, [], self._nodes()
        for card in system.names("/sys/class/drm", "card"):
            folder = f"/sys/class/drm/{card}/device"
            if system.text(f"{folder}/vendor") != "0x1002":
                continue
            pci = system.pairs(f"{folder}/uevent", "=").get("PCI_SLOT_NAME")
            sizes = ("vram_total", "vram_used", "gtt_total")
            total, used, host = (system.number(f"{folder}/mem_info_{size}") for size in sizes)
            if total is None or used is None:
                system.note(f"AMD: the driver of {pci or card} does not say how much memory it has; it is left out")
                continue
            node, compute = nodes.get(pci or "", (len(nodes), None))
            chip = compute or system.text(f"{folder}/device") or card
            name, uuid = system.text(f"{folder}/product_name") or f"AMD GPU {chip}", system.text(f"{folder}/unique_id")
            found.append((node, pci or "", Device("rocm", name, 0, total, max(0, total - used), compute=compute,
                                                  pci=pci, uuid=uuid and f"GPU-{uuid}", host=host)))
        return [device._replace(index=i) for i, (_, _, device) in enumerate(sorted(found, key=lambda f: f[:2]))]

    def _nodes(self) -> dict[str, tuple[int, str]]:
        """Return (order, target such as gfx90a) of GPUs in kfd's topology, by PCI address."""
        found = {}
        for node in self.system.names("/sys/class/kfd/kfd/topology/nodes"):
            values = self.system.pairs(f"/sys/class/kfd/kfd/topology/nodes/{node}/properties")
            keys = ("gfx_target_version", "location_id", "domain")
            target, place, domain = (leading_int(values.get(key, "")) or 0 for key in keys)
            if target:                                                         # 90010 is gfx90a; CPUs have 0
                pci = f"{domain:04x}:{place >> 8 & 255:02x}:{place >> 3 & 31:02x}.{place & 7}"
                found[pci] = len(found), f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"
        return found


class Apple:
    """The GPU of Apple silicon, which shares main memory up to a limit: Metal's recommendedMaxWorkingSetSize.

    iogpu.wired_limit_mb sets that limit; where it is 0 the system chooses. Metal alone says exactly what; without it,
    two thirds of the memory below 36 GiB and three quarters from there on. Reported are 10.67 of 16 GiB (exo pull
    request 1672), 21845 of 32768 MiB (ollama#434), 48 of 64 GiB (llama.cpp#1870), 72 of 96, 96 of 128, 144
    of 192 GiB (Rapid-MLX pull request 183). Newer systems give large machines more (107.5 of 128 GiB: antirez/ds4 pull
    request 893), so this is a lower bound.
    """

    def __init__(self, system: System, memory: Memory):
        self.system, self.memory = system, memory

    def detect(self) -> list[Device]:
        """Return the GPU of a machine with Apple silicon; free is what main memory and the limit both allow."""
        if self.system.platform != "darwin":
            return []
        values = self.system.sysctl()
        name, total = values.get("machdep.cpu.brand_string", ""), self.memory.total
        if not name.startswith("Apple"):                                       # Intel's Macs
            return []
        limit = (leading_int(values.get("iogpu.wired_limit_mb", "")) or 0) << 20
        if not limit:
            limit = total * 2 // 3 if total < 36 * GIB else total * 3 // 4
            self.system.note("Metal: the system sets the limit of the GPU's memory; two thirds of it are assumed, "
                             "from 36 GiB on three quarters")
        return [Device("metal", name, 0, limit, min(limit, self.memory.available), True)]


def devices(system: System, memory: Memory) -> list[Device]:
    """Return the GPUs of this machine."""
    return [*Nvidia(system, memory).detect(), *Amd(system).detect(), *Apple(system, memory).detect()]


def _text(value: str | bytes) -> str:
    """Return text of NVML, which older versions of its package gave as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _pci(text: str) -> str:
    """Return NVML's "00000000:07:00.0" as Linux writes it: "0000:07:00.0"."""
    domain, _, rest = text.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"
