"""What is detected of machines: recorded ones (tests/fixtures/hardware, each with its source), odd ones, this one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyengine import hardware
from pyengine.cli.command import execute
from pyengine.cli.report import machine
from pyengine.hardware import gpu, System
from pyengine.hardware.cores import Core, physical_cores, threads
from pyengine.hardware.facts import Cache, Device, Memory
from pyengine.hardware.memory import Cgroups
from pyengine.hardware.system import parse_cpus, run_command

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "fixtures" / "hardware"
MIB, GIB = 1 << 20, 1 << 30


def machine_of(folder: Path, lines: list[str], **settings) -> System:
    """A system of lines as `grep -H "" FILES` prints them, "/path:line", and of "$ command", then its output."""
    files, commands, about, into = {}, {}, {}, None
    for line in lines:
        if line.startswith("$ "):
            into = commands.setdefault(line[2:], [])
        elif into is not None:
            into.append(line)
        elif line.startswith("/"):
            path, _, text = line.partition(":")
            files.setdefault(path, []).append(text)
        elif line and not line.startswith("#"):
            key, _, value = line.partition(" ")
            about[key] = value
    for path, content in files.items():
        (folder / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (folder / path[1:]).write_text("\n".join(content) + "\n")
    online = parse_cpus(files.get("/sys/devices/system/cpu/online", [""])[0]) or None
    made = {
        "platform": about.get("platform", "linux"),
        "machine": about.get("machine", "x86_64"),
        "environ": {},
        "run": lambda *command: "\n".join(commands.get(" ".join(command), [])) or None,
        "affinity": lambda: online,
        "nvml": no_nvml,
    }
    return System(str(folder), **{**made, **settings})


def no_nvml() -> None:
    raise ImportError("no pynvml")


@pytest.fixture
def recorded(tmp_path):
    """Load a recorded machine by its name."""
    return lambda name, **more: machine_of(tmp_path, (RECORDED / f"{name}.txt").read_text().splitlines(), **more)


def made(tmp_path: Path, *lines: str, **more) -> System:
    return machine_of(tmp_path, list(lines), **more)


# --- memory and control groups ----------------------------------------------------------------------------------------

MEMINFO = [
    "/proc/meminfo:MemTotal: 16777216 kB",
    "/proc/meminfo:MemFree: 1048576 kB",
    "/proc/meminfo:MemAvailable: 12582912 kB",
]
V2 = "/proc/self/mountinfo:30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "/proc/self/mountinfo:34 25 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def group(path: str, limit: object, used: int, unused: int = 0, high: object = "max") -> list[str]:
    folder = f"/sys/fs/cgroup{path}"
    return [
        f"{folder}/memory.max:{limit}",
        f"{folder}/memory.high:{high}",
        f"{folder}/memory.current:{used}",
        f"{folder}/memory.stat:anon 5",
        f"{folder}/memory.stat:inactive_file {unused}",
        f"{folder}/memory.stat:active_file 7",
    ]


def test_without_a_limit_the_system_says_what_is_available(tmp_path) -> None:
    system = made(tmp_path, *MEMINFO, V2, "/proc/self/cgroup:0::/user.slice", *group("/user.slice", "max", 5 * GIB))
    assert hardware.memory_limit(system) is None
    assert hardware.available_memory(system) == 12 * GIB


def test_each_group_up_to_the_top_limits(tmp_path) -> None:
    system = made(
        tmp_path,
        *MEMINFO,
        V2,
        "/proc/self/cgroup:0::/a/b/c",
        *group("/a/b/c", "max", GIB),
        *group("/a/b", 4 * GIB, GIB),
        *group("/a", 8 * GIB, 6 * GIB, GIB),
        *group("/other", GIB, GIB),
    )
    assert Cgroups(system).memory() == [(4 * GIB, GIB), (8 * GIB, 5 * GIB)]
    assert hardware.memory_limit(system) == (4 * GIB, GIB)
    assert hardware.available_memory(system) == 3 * GIB
    (tmp_path / "sys/fs/cgroup/a/memory.current").write_text(f"{8 * GIB}")  # others fill the larger limit
    assert hardware.memory_limit(system) == (4 * GIB, GIB)
    assert hardware.available_memory(system) == GIB  # 8 - 8 used, 1 of that can be dropped


def test_file_pages_that_nobody_touches_are_not_used_memory(tmp_path) -> None:
    system = made(tmp_path, *MEMINFO, V2, "/proc/self/cgroup:0::/", *group("", 4 * GIB, 3 * GIB, unused=2 * GIB))
    assert hardware.memory_limit(system) == (4 * GIB, GIB) and hardware.available_memory(system) == 3 * GIB
    (tmp_path / "sys/fs/cgroup/memory.stat").unlink()
    assert hardware.available_memory(system) == GIB


def test_memory_high_limits_and_nothing_is_negative(tmp_path) -> None:
    system = made(tmp_path, *MEMINFO, V2, "/proc/self/cgroup:0::/s", *group("/s", 8 * GIB, 3 * GIB, high=2 * GIB))
    assert hardware.memory_limit(system) == (2 * GIB, 3 * GIB) and hardware.available_memory(system) == 0


def test_version_1_counts_the_whole_tree(tmp_path) -> None:
    folder = "/sys/fs/cgroup/memory/docker/x"
    system = made(
        tmp_path,
        *MEMINFO,
        V1,
        "/proc/self/cgroup:5:cpuset:/",
        "/proc/self/cgroup:4:memory:/docker/x",
        f"{folder}/memory.limit_in_bytes:{2 * GIB}",
        f"{folder}/memory.usage_in_bytes:{GIB}",
        f"{folder}/memory.stat:inactive_file 1",
        f"{folder}/memory.stat:total_inactive_file {GIB // 2}",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes:9223372036854771712",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes:99999",
    )
    assert Cgroups(system).memory() == [(2 * GIB, GIB // 2)]


@pytest.mark.parametrize(
    "path, top", [("/docker/x", "/docker/x"), ("/", "/"), ("/../../host/y", "/"), ("/elsewhere", "/docker/x")]
)
def test_in_a_container_the_mounted_part_is_read(tmp_path, path, top) -> None:
    """The path may be the host's, with the mount beginning there; the container's own; or lead out of the mount."""
    system = made(
        tmp_path,
        *MEMINFO,
        V2.replace("0:26 / ", f"0:26 {top} "),
        f"/proc/self/cgroup:0::{path}",
        *group("", GIB, 0),
        *group("/docker/x", 5, 0),
    )
    assert hardware.memory_limit(system) == (GIB, 0)


def test_a_group_below_the_mounted_part(tmp_path) -> None:
    system = made(
        tmp_path,
        *MEMINFO,
        V2.replace("0:26 / ", "0:26 /pod "),
        "/proc/self/cgroup:0::/pod/one",
        *group("", 2 * GIB, 0),
        *group("/one", GIB, 0),
        *group("/pod/one", 5, 0),
    )
    assert Cgroups(system).memory() == [(GIB, 0), (2 * GIB, 0)]
    (tmp_path / "proc/self/cgroup").write_text("0::/podium/one\n")  # another group, whose name begins alike
    assert Cgroups(system).memory() == [(2 * GIB, 0)]


def test_cpu_quotas(tmp_path) -> None:
    system = made(
        tmp_path,
        V2,
        "/proc/self/cgroup:0::/a/b",
        "/sys/fs/cgroup/a/b/cpu.max:max 100000",
        "/sys/fs/cgroup/a/cpu.max:150000 100000",
        "/sys/fs/cgroup/cpu.max:400000 100000",
    )
    assert Cgroups(system).cpu_quota() == 1.5
    v1 = made(
        tmp_path / "1",
        V1.replace("/memory", "/cpu,cpuacct").replace("rw,memory", "rw,cpu,cpuacct"),
        "/proc/self/cgroup:3:cpu,cpuacct:/d",
        "/sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_quota_us:250000",
        "/sys/fs/cgroup/cpu,cpuacct/d/cpu.cfs_period_us:100000",
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us:-1",
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us:100000",
    )
    assert Cgroups(v1).cpu_quota() == 2.5
    assert Cgroups(made(tmp_path / "2")).cpu_quota() is None


def test_swap_is_not_memory_and_an_old_kernel_counts_what_is_free(tmp_path) -> None:
    system = made(tmp_path, *MEMINFO[:2], "/proc/meminfo:SwapFree: 99999999 kB")
    assert hardware.available_memory(system) == GIB and "3.14" in system.notes[0]


# --- processors -------------------------------------------------------------------------------------------------------

PLAIN = [Core((0, 4)), Core((1, 5)), Core((2, 6)), Core((3, 7))]
MIXED = [Core((0, 1)), Core((2, 3)), Core((4,), "efficiency"), Core((5,), "efficiency")]


@pytest.mark.parametrize(
    "cores, affinity, quota, n",
    [
        (PLAIN, None, None, 4),
        (PLAIN, {0, 1, 2, 3, 4, 5, 6, 7}, None, 4),
        (PLAIN, {0, 4}, None, 1),
        (PLAIN, {3, 4, 5}, None, 3),
        (MIXED, None, None, 2),
        (MIXED, {1, 4, 5}, None, 1),
        (MIXED, {4, 5}, None, 2),
        (PLAIN, None, 2.5, 3),
        (PLAIN, None, 0.5, 1),
        (PLAIN, None, 64.0, 4),
        (PLAIN, {5}, 3.0, 1),
        ([], {0, 1}, None, 2),
        ([], None, None, 1),
        (PLAIN, {99}, None, 1),
    ],
)
def test_threads(cores, affinity, quota, n) -> None:
    assert threads(cores, None if affinity is None else frozenset(affinity), quota) == n


def test_a_recorded_virtual_machine(recorded) -> None:
    """lscpu said on it: 2 cores, 1 thread each, L1d 96 KiB (2 instances), L2 2 MiB (2), L3 32 MiB (1)."""
    found = hardware.detect(recorded("epyc-vm"))
    assert (found.cpu.name, found.cpu.n_cores, found.cpu.n_cpus, found.cpu.n_threads) == ("AMD EPYC", 2, 2, 2)
    assert found.cpu.caches == (Cache(1, 48 << 10, 2, 1), Cache(2, MIB, 2, 1), Cache(3, 32 * MIB, 1, 2))
    assert found.memory == Memory(24684092 * 1024, 22966772 * 1024) and found.notes == ()
    assert [(n.index, n.cpus, n.total) for n in found.numa] == [(0, (0, 1), 24684092 * 1024)]
    assert [d.id for d in found.devices] == ["cpu"]


def test_hybrid_intel(recorded) -> None:
    found = hardware.detect(recorded("core-i7-12700k")).cpu
    assert [(k.kind, k.n_cores, k.n_cpus, k.max_mhz) for k in found.kinds] == [
        ("performance", 8, 16, 5000),
        ("efficiency", 4, 4, 3800),
    ]
    assert (found.n_cores, found.n_cpus, found.n_threads) == (12, 20, 8)
    assert found.caches == (
        Cache(1, 48 << 10, 8, 2),
        Cache(1, 32 << 10, 4, 1),
        Cache(2, 2 * MIB, 1, 4),
        Cache(2, 1280 << 10, 8, 2),
        Cache(3, 25 * MIB, 1, 20),
    )
    bound = hardware.detect(recorded("core-i7-12700k", affinity=lambda: frozenset(range(14, 20)))).cpu
    assert (bound.n_threads, [k.n_usable for k in bound.kinds]) == (1, [1, 4])


def test_hybrid_intel_without_its_lists_goes_by_clocks(recorded, tmp_path) -> None:
    system = recorded("core-i7-12700k")
    for name in ("core", "atom"):
        (tmp_path / f"sys/devices/cpu_{name}/cpus").unlink()
    assert [c.kind for c in physical_cores(system)] == ["performance"] * 8 + [
        "efficiency"
    ] * 4  # 4.9 is like 5.0, 3.8 not


def test_two_sockets(recorded) -> None:
    found = hardware.detect(recorded("xeon-e5-2680-v2-x2"))
    assert (found.cpu.n_cores, found.cpu.n_cpus, found.cpu.n_threads, len(found.cpu.kinds)) == (20, 40, 20, 1)
    assert [(n.index, len(n.cpus), n.total, n.free) for n in found.numa] == [
        (0, 20, 65536000 * 1024, 50000000 * 1024),
        (1, 20, 32768000 * 1024, 10000000 * 1024),
    ]
    assert found.numa[1].cpus[0] == 10 and Cache(3, 25 * MIB, 2, 20) in found.cpu.caches


def test_big_and_little_arm(recorded) -> None:
    found = hardware.detect(recorded("rock-5b"))
    assert found.cpu.name == "Cortex-A55 + Cortex-A76" and found.cpu.architecture == "aarch64"
    assert [(k.kind, k.n_cores, k.max_mhz) for k in found.cpu.kinds] == [
        ("performance", 4, 2256),
        ("efficiency", 4, 1800),
    ]
    assert found.cpu.n_threads == 4 and found.cpu.caches == () and found.notes == ("cpu: sysfs does not list caches",)


@pytest.mark.parametrize(
    "capacities, kinds", [((1024, 1024, 620, 160), "ppe"), ((1024, 1024, 1024, 1024), "p"), ((0, 0, 0, 0), "p")]
)
def test_cores_of_three_kinds_and_of_one(tmp_path, capacities, kinds) -> None:
    cpu = "/sys/devices/system/cpu"
    system = made(tmp_path, f"{cpu}/online:0-3", *(f"{cpu}/cpu{i}/cpu_capacity:{c}" for i, c in enumerate(capacities)))
    found = [core.kind[0] for core in physical_cores(system)]
    assert found == (["p", "p", "p", "e"] if kinds == "ppe" else ["p"] * 4)
    assert system.notes == ["cpu: no topology in sysfs; each logical CPU counts as a core"]


def test_apple_silicon(recorded) -> None:
    found = hardware.detect(recorded("apple-m1-pro", affinity=lambda: None))
    assert (found.cpu.name, found.cpu.n_cores, found.cpu.n_threads, found.cpu.affinity) == ("Apple M1 Pro", 10, 8, None)
    assert [(k.kind, k.n_cores) for k in found.cpu.kinds] == [("performance", 8), ("efficiency", 2)]
    assert found.cpu.caches == (
        Cache(1, 128 << 10, 8, 1),
        Cache(1, 64 << 10, 2, 1),
        Cache(2, 12 * MIB, 2, 4),
        Cache(2, 4 * MIB, 1, 2),
    )
    assert found.memory == Memory(16 * GIB, 400000 * 16384)
    metal = found.devices[1]
    assert (metal.id, metal.unified, metal.total, metal.free) == ("metal:0", True, 16 * GIB * 2 // 3, 400000 * 16384)
    assert any("two thirds" in note for note in found.notes)


@pytest.mark.parametrize(
    "gib, limit_mb, reported",
    [
        (16, 0, 10.67 * 1024),
        (32, 0, 21845),
        (64, 0, 48 * 1024),
        (96, 0, 72 * 1024),
        (192, 0, 144 * 1024),
        (128, 114688, 112 * 1024),
    ],
)
def test_the_limit_of_apples_gpu(tmp_path, gib, limit_mb, reported) -> None:
    system = made(
        tmp_path,
        "platform darwin",
        "$ sysctl hw machdep.cpu iogpu",
        "machdep.cpu.brand_string: Apple M3 Ultra",
        f"iogpu.wired_limit_mb: {limit_mb}",
    )
    [device] = gpu.Apple(system, Memory(gib * GIB, gib * GIB)).detect()
    assert device.total / MIB == pytest.approx(reported, rel=5e-4) and bool(system.notes) == (not limit_mb)


def test_macs_with_intels_processors_have_no_unified_gpu(tmp_path) -> None:
    system = made(
        tmp_path,
        "platform darwin",
        "$ sysctl hw machdep.cpu iogpu",
        "hw.physicalcpu: 6",
        "hw.logicalcpu: 12",
        "hw.l1dcachesize: 32768",
        "hw.l3cachesize: 12582912",
        "hw.memsize: 17179869184",
        "machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz",
    )
    found = hardware.detect(system)
    assert (found.cpu.n_cores, found.cpu.n_cpus, len(found.devices)) == (6, 12, 1)
    assert found.cpu.caches == (Cache(1, 32 << 10, 6, 2), Cache(3, 12 * MIB, 1, 12))


# --- GPUs -------------------------------------------------------------------------------------------------------------


class FakeNvml:
    """NVML as nvidia-ml-py has it, over a recorded machine; a handle is the GPU's or instance's record."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    class NVMLError_FunctionNotFound(NVMLError):
        pass

    def __init__(self, name: str, fails: str = ""):
        self.gpus, self.fails, self.open = json.loads((RECORDED / f"nvml-{name}.json").read_text())["gpus"], fails, 0

    def _known(self, handle, key):
        if handle.get(key) is None:
            raise self.NVMLError_NotSupported("Not Supported")
        return handle[key]

    def nvmlInit(self):
        if self.fails == "nvmlInit":
            raise self.NVMLError("Driver/library version mismatch")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        if self.fails == "nvmlDeviceGetCount":
            raise self.NVMLError("GPU is lost")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, i):
        assert self.open == 1
        return self.gpus[i]

    def nvmlDeviceGetName(self, handle):
        return handle["name"].encode()  # as older versions give it

    def nvmlDeviceGetUUID(self, handle):
        return handle["uuid"]

    def nvmlDeviceGetPciInfo(self, handle):
        return SimpleNamespace(busId=handle["pci"])

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(
            total=self._known(handle, "total"), free=handle["free"], used=handle["total"] - handle["free"]
        )

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self._known(handle, "compute")

    def nvmlDeviceGetMigMode(self, handle):
        mode = self._known(handle, "mig")
        return [int(mode), int(mode)]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, i):
        if str(i) not in handle["instances"]:
            raise self.NVMLError_NotFound("Not Found")
        return handle["instances"][str(i)]

    def nvmlDeviceGetNumGpuCores(self, handle):
        return self._known(handle, "cores")

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        assert kind == self.NVML_CLOCK_SM
        return self._known(handle, "clock")


def nvidia(tmp_path: Path, name: str, fails: str = "", **environ) -> tuple[list[Device], System]:
    nvml = FakeNvml(name, fails)
    system = made(tmp_path, "/proc/driver/nvidia/version:NVRM", environ=environ, nvml=lambda: nvml)
    found = gpu.Nvidia(system, Memory(64 * GIB, 32 * GIB)).detect()
    assert nvml.open == 0 and [d.index for d in found] == list(range(len(found)))
    return found, system


A100 = (
    "GPU-d8594bd4-0fc3-8595-e355-7c98138f3b95",
    "GPU-5e375e7e-b41f-155b-dcdc-534524c356fc",
    "GPU-69ec2344-ebac-b028-f88f-452abb3d7f11",
)
MIG = "MIG-ce861fb0-a248-58ce-a9a8-f9adbc22a66a", "MIG-a45882f0-9215-5733-a0c1-49286ab31cb5"


def test_our_fake_has_nvmls_names() -> None:
    pynvml = pytest.importorskip("pynvml", reason="pip install nvidia-ml-py")
    assert [name for name in vars(FakeNvml) if name.startswith(("nvml", "NVML")) and not hasattr(pynvml, name)] == []
    for name in ("NVMLError_NotSupported", "NVMLError_NotFound", "NVMLError_FunctionNotFound"):
        assert issubclass(getattr(pynvml, name), pynvml.NVMLError)


def test_nvidia_gpus(tmp_path) -> None:
    found, system = nvidia(tmp_path, "a100-mig")
    assert [d.uuid for d in found] == list(A100)  # the one in MIG mode is no whole GPU
    first = found[0]
    assert (first.id, first.name, first.compute, first.pci) == (
        "cuda:0",
        "NVIDIA A100-SXM4-80GB",
        "8.0",
        "0000:0b:00.0",
    )
    assert (first.total, first.free, first.unified) == (81920 * MIB, 81420 * MIB, False)
    assert system.notes == ["NVIDIA: a process sees one of the 4 MIG instances at most; CUDA_VISIBLE_DEVICES names it"]


@pytest.mark.parametrize(
    "setting, seen",
    [
        ("", []),
        ("-1", []),
        ("1", A100[:1]),
        ("3,1", (A100[2], A100[0])),
        ("1,2,-1,3", A100[:2]),
        ("1,9,2", A100[:1]),
        ("1,x,2", A100[:1]),
        ("1,1", []),
        ("1,GPU-d8594bd4", []),
        (" 2 , 3 ", A100[1:]),
        ("1gpu,+2", A100[:2]),
        ("GPU-5e375e7e", A100[1:2]),
        ("GPU-5e,GPU-d", (A100[1], A100[0])),
        ("GPU-d,GPU-5,GPU-6", A100[:1]),
        ("GPU-", []),
        ("GPU-ffff", []),
        (A100[0], A100[:1]),
        (MIG[1], MIG[1:]),
        ("MIG-ce86", MIG[:1]),
        (f"{MIG[1]},{MIG[0]}", MIG[1:]),
        ("0", MIG[:1]),
        ("0,1", MIG[:1]),
        ("1,0", A100[:1]),
        ("MIG-nothere", []),
        ("99999999999999999999999", []),
    ],
)
def test_cuda_visible_devices(tmp_path, setting, seen) -> None:
    found, system = nvidia(tmp_path, "a100-mig", CUDA_VISIBLE_DEVICES=setting, CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert [d.uuid for d in found] == list(seen)
    hidden = {
        "1,9,2": "no '9'",
        "1,x,2": "no 'x'",
        "1,1": "comes twice",
        "GPU-": "no 'GPU-'",
        "MIG-nothere": "no 'MIG-nothere'",
    }
    if setting in hidden:
        assert any(hidden[setting] in note for note in system.notes)


def test_the_selection_of_whole_gpus_is_pytorchs(tmp_path, monkeypatch) -> None:
    """torch.cuda reads the variable without a GPU too: indices and beginnings of UUIDs."""
    cuda = pytest.importorskip("torch.cuda")
    uuids = [
        "GPU-aaaa1111-0000-0000-0000-000000000001",
        "GPU-aaaa2222-0000-0000-0000-000000000002",
        "GPU-bbbb3333-0000-0000-0000-000000000003",
    ]
    for setting in (
        "0",
        "2,1",
        "1,1",
        "0,2,-1,1",
        "",
        "-1",
        "1gpu2,2ampere",
        "GPU-aaaa",
        "GPU-aaaa2,GPU-b",
        "GPU-b,GPU-b",
        "GPU-b,GPU-x,GPU-aaaa1",
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        theirs = cuda._parse_visible_devices()
        if theirs and isinstance(theirs[0], str):
            theirs = cuda._transform_uuid_to_ordinals(theirs, uuids)
        found, _ = nvidia(tmp_path, "different", CUDA_VISIBLE_DEVICES=setting, CUDA_DEVICE_ORDER="PCI_BUS_ID")
        assert [d.uuid for d in found] == [uuids[i] for i in theirs], setting


def test_an_instance(tmp_path) -> None:
    [found], _ = nvidia(tmp_path, "a100-mig", CUDA_VISIBLE_DEVICES=MIG[0])
    assert (found.name, found.total, found.free) == ("NVIDIA A100-SXM4-80GB MIG 1g.20gb", 19968 * MIB, 19955 * MIB)
    assert (found.parent, found.compute, found.pci) == (
        "GPU-513536b6-7d19-9063-b049-1e69664bb298",
        "8.0",
        "0000:07:00.0",
    )


def test_cudas_order(tmp_path) -> None:
    found, system = nvidia(tmp_path, "different")
    assert [d.name.split()[-1] for d in found] == ["4090", "GB10", "3060"] and "cores x clock" in system.notes[-1]
    found, system = nvidia(tmp_path, "different", CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES="1,0")
    assert [d.name.split()[-1] for d in found] == ["4090", "3060"] and not any("clock" in note for note in system.notes)


def test_a_gpu_without_memory_of_its_own_shares_the_cpus(tmp_path) -> None:
    [found], system = nvidia(tmp_path, "different", CUDA_VISIBLE_DEVICES="GPU-bbbb")
    assert (found.total, found.free, found.unified, found.pci) == (64 * GIB, 32 * GIB, True, "000f:01:00.0")
    assert any("share the CPU's" in note for note in system.notes)


def test_nvidia_gpus_that_cannot_be_asked_are_left_out_and_named(tmp_path) -> None:
    for fails, said in (("nvmlInit", "version mismatch"), ("nvmlDeviceGetCount", "GPU is lost")):
        found, system = nvidia(tmp_path, "a100-mig", fails)
        assert found == [] and said in system.notes[0]
    system = made(tmp_path, "/proc/driver/nvidia/version:NVRM")
    assert gpu.Nvidia(system, Memory(1, 1)).detect() == [] and "pip install nvidia-ml-py" in system.notes[0]


def test_without_a_driver_nvml_is_not_touched(tmp_path) -> None:
    def never():
        raise AssertionError("imported")

    system = made(tmp_path, nvml=never)
    assert gpu.Nvidia(system, Memory(1, 1)).detect() == [] and system.notes == []


def test_amd_gpus(recorded) -> None:
    system = recorded("amd-gpus")
    xtx, apu = gpu.Amd(system).detect()  # kfd's order, not the cards'
    assert (xtx.id, xtx.name, xtx.compute, xtx.pci) == ("rocm:0", "AMD GPU gfx1100", "gfx1100", "0000:03:00.0")
    assert (xtx.total, xtx.free, xtx.uuid, xtx.host) == (24560 * MIB, 23536 * MIB, "GPU-398a3f843a146602", 64 * GIB)
    assert (apu.compute, apu.total, apu.free, apu.host) == (
        "gfx1151",
        512 * MIB,
        57 * MIB,
        124 * GIB,
    ) and system.notes == []


def test_amd_gpus_without_rocm_and_without_sizes(recorded, tmp_path) -> None:
    system = recorded("amd-gpus")
    for node in range(3):
        (tmp_path / f"sys/class/kfd/kfd/topology/nodes/{node}/properties").unlink()
    (tmp_path / "sys/class/drm/card1/device/mem_info_vram_total").unlink()
    (tmp_path / "sys/class/drm/card2/device/product_name").write_text("Radeon RX 7900 XTX\n")
    [found] = gpu.Amd(system).detect()
    assert (found.name, found.compute) == ("Radeon RX 7900 XTX", None) and "0000:c4:00.0" in system.notes[0]


# --- unknown and broken machines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_machine_that_says_nothing(tmp_path, platform) -> None:
    found = hardware.detect(
        made(tmp_path, platform=platform, affinity=lambda: frozenset({3}) if platform == "linux" else None)
    )
    assert found.memory == Memory(0, 0) and (found.cpu.n_cores, found.cpu.n_threads) == (1, 1)
    assert len(found.notes) >= 2 and any("assumed" in n for n in found.notes) and any("cpu:" in n for n in found.notes)
    assert [d.id for d in found.devices] == ["cpu"]


@pytest.mark.parametrize(
    "key", ["hw.nperflevels", "hw.perflevel0.logicalcpu", "hw.perflevel0.physicalcpu", "hw.perflevel1.l2cachesize"]
)
def test_absurd_counts_are_not_believed(key, tmp_path) -> None:
    lines = [
        f"{key}: 99999999999999999999" if line.startswith(f"{key}:") else line
        for line in (RECORDED / "apple-m1-pro.txt").read_text().splitlines()
    ]
    assert 1 <= hardware.detect(machine_of(tmp_path, lines)).cpu.n_cores <= 10


def test_another_system_is_asked_by_psutil(tmp_path) -> None:
    import psutil

    found = hardware.detect(made(tmp_path, platform="plan9"))
    assert found.memory.total == psutil.virtual_memory().total and found.cpu.n_cpus == psutil.cpu_count()
    assert any("plan9" in note for note in found.notes)


NAMES = sorted(path.stem for path in RECORDED.glob("*.txt"))
JUNK = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "-1",
            "0",
            "max",
            "99999999999999999999",
            "0-",
            "-",
            ",,",
            "0-99999999999",
            ":",
            "a:b:c",
            "9" * 5000,
            "0x",
            "²",
            "٣",
            "1 2 3",
            "4:memory:/" + "../" * 9,
        ]
    ),
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(choice=st.data())
def test_broken_files_break_nothing(name, tmp_path_factory, choice) -> None:
    lines = (RECORDED / f"{name}.txt").read_text().splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith("/") or ": " in line and not line.startswith("#")]
    for i in choice.draw(st.lists(st.sampled_from(places), max_size=8)):
        junk = re.sub(r"[\r\n]", " ", choice.draw(JUNK)).encode(errors="replace").decode()
        lines[i] = lines[i].partition(":")[0] + ":" + junk
    found = hardware.detect(machine_of(tmp_path_factory.mktemp("broken"), lines))
    assert found.cpu.n_threads >= 1 and found.memory.available >= 0
    json.dumps(found.to_json())


# --- this machine -----------------------------------------------------------------------------------------------------


def test_this_machine_is_as_psutil_has_it() -> None:
    import psutil

    found = hardware.detect()
    assert found.memory.total == psutil.virtual_memory().total
    assert found.cpu.n_cpus == psutil.cpu_count() and found.cpu.n_cores == (
        psutil.cpu_count(logical=False) or found.cpu.n_cpus
    )
    assert 0 < found.memory.available <= found.memory.total
    if hardware.memory_limit() is None:
        assert found.memory.available == pytest.approx(psutil.virtual_memory().available, rel=0.1)
    assert found.cpu.n_threads == hardware.default_threads() <= len(found.cpu.affinity or range(found.cpu.n_cpus))
    json.dumps(found.to_json())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to CPUs")
def test_threads_follow_the_process_that_asks() -> None:
    code = (
        "import os; from pyengine import hardware; from pyengine.backends.cpu import Backend; "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "print(hardware.default_threads(), Backend().n_threads)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "1"], done.stderr


def test_questions_of_loading_import_little() -> None:
    code = (
        "import sys; from pyengine import hardware; hardware.available_memory(); hardware.default_threads(); "
        "print(*{'psutil', 'pynvml', 'subprocess', 'dataclasses', 'numpy', 'pyengine.hardware.gpu'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and (done.stdout.strip() == "" or sys.platform != "linux"), done.stdout + done.stderr


def test_commands() -> None:
    assert run_command(sys.executable, "-c", "print('a: 1')") == "a: 1\n"
    assert run_command("no-such-program-here") is None and run_command(sys.executable, "-c", "") is None


def test_the_command(capsys) -> None:
    assert execute(["hardware", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["cpu"]["isas"]
        and found["devices"][0]["id"] == "cpu"
        and found["memory"]["total"] == found["devices"][0]["total"]
        or found["memory"]["limit"]
    )
    assert execute(["hardware"]) == 0
    out = capsys.readouterr().out
    assert found["cpu"]["name"] in out and " available" in out and "\nDevices\n  cpu" in out
    assert execute(["hardware", "--help"]) == 0 and "pyengine-run hardware" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "core-i7-12700k",
            [
                "8 performance, 16 logical CPUs, up to 5.00 GHz",
                "4 efficiency, up to 3.80 GHz",
                "8 by default",
                "1.2 MiB x 8",
            ],
        ),
        ("xeon-e5-2680-v2-x2", ["node 1", "31.2 GiB, 9.5 GiB free, 20 logical CPUs", "20, 40 logical CPUs"]),
        ("apple-m1-pro", ["metal:0", "10.7 GiB", "shares the CPU's memory", "two thirds"]),
        ("amd-gpus", ["rocm:1", "gfx1151", "and 124.0 GiB of main memory"]),
    ],
)
def test_machines_for_people(recorded, capsys, name, words) -> None:
    machine.show_hardware(hardware.detect(recorded(name)))
    out = capsys.readouterr().out
    assert [word for word in words if word not in out] == [], out


def test_limits_for_people(tmp_path, capsys) -> None:
    machine.show_hardware(
        hardware.detect(
            made(
                tmp_path,
                *MEMINFO,
                V2,
                "/proc/self/cgroup:0::/",
                *group("", 4 * GIB, GIB),
                "/sys/fs/cgroup/cpu.max:150000 100000",
                affinity=lambda: frozenset(range(4)),
            )
        )
    )
    out = capsys.readouterr().out
    assert "4.0 GiB by control group, 1.0 GiB of it used" in out and "1.5 processors" in out and "2 by default" in out
