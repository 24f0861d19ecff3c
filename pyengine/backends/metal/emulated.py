"""A Metal device that is emulated: csrc/metal compiled as C++, run by the fibres of csrc/emulate on memory of the host.

$PYENGINE_EMULATE=checked: every access of memory is watched, and one outside of a launch's buffers is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pyengine import hardware
from pyengine.backends.building import CSRC, Job, library, ROOT
from pyengine.backends.metal import sources, thunks
from pyengine.backends.metal.device import Bound, Device, Memory, Recording
from pyengine.errors import GraphError

FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-attributes",
         "-g1", "-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{CSRC / 'metal'}")
CHECKED = ("-O1", "-fno-tree-sra", "-fno-tree-fre", "-fno-tree-pre", "-fno-tree-forwprop", "-fsanitize=thread", "--param",
           "tsan-instrument-func-entry-exit=0")
MESSAGE_BYTES = 4096


def build(checked: bool = False, kernels: Path | None = None) -> Path:
    """Compile the kernels of a folder (default: ours) with the emulator and return the library. Raises: GraphError with the compiler's words."""
    if not (CSRC / "emulate").is_dir():
        raise GraphError(f"there is no {CSRC / 'emulate'}: kernels are emulated in a checkout of pyengine only")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "c++"
    place = kernels or sources.folder()
    name = "metal" if kernels is None else f"metal-{place.name}"
    folder = ROOT / "build" / "emulated" / f"{name}-sources"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {n: thunks.source(lib, place / f"{n}.metal") for n, lib in sources.libraries(place).items()}
    texts["tables"] = thunks.index(sorted(texts))
    watched, define = (CHECKED, ("-DPE_CHECKED",)) if checked else ((), ())
    jobs = []
    for part, text in texts.items():
        path = folder / f"{part}.cpp"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            new = path.with_suffix(f".{os.getpid()}")
            new.write_text(text, encoding="utf-8")
            new.replace(path)
        jobs.append(Job(path, (compiler, *FLAGS, *watched, *define)))
    own = [*sorted((CSRC / "emulate").glob("*.cpp")), *sorted((CSRC / "emulate" / "metal").glob("*.cpp"))]
    jobs += [Job(path, (compiler, *FLAGS, *define)) for path in own]
    return library(f"{name}-checked" if checked else name, jobs, [compiler, "-shared", "-pthread"], ROOT / "build" / "emulated")


@lru_cache(maxsize=8)
def opened(checked: bool, kernels: Path | None = None) -> tuple[Any, Any]:
    """Return (ffi, library), built where that has not been done."""
    from cffi import FFI

    header = (CSRC / "emulate" / "metal" / "device.h").read_text(encoding="utf-8")
    plain = re.sub(r"/\*.*?\*/", "", header.split('extern "C" {\n#endif')[1].split("#ifdef __cplusplus")[0], flags=re.S)
    ffi = FFI()
    ffi.cdef(plain)
    return ffi, ffi.dlopen(str(build(checked, kernels)))


class HostMemory(Memory):
    """Bytes of the host, from an address that is a multiple of 64."""

    def __init__(self, nbytes: int):
        whole = np.zeros(max(nbytes, 1) + 64, np.uint8)
        start = -whole.ctypes.data % 64
        self.array = whole[start : start + nbytes]


class MappedMemory(Memory):
    """Bytes that somebody else keeps, such as those of a mapped file."""

    def __init__(self, array: np.ndarray):
        self.array = array


class EmulatedRecording(Recording):
    """Launches as structures in C, which one call runs."""

    def __init__(self, device: EmulatedDevice, bound: Sequence[Bound]):
        self.device, self.n = device, len(bound)
        ffi = device.ffi
        self._launches = ffi.new("pe_metal_launch[]", max(1, self.n))
        self._message = ffi.new("char[]", MESSAGE_BYTES)
        self._args: list[Any] = []
        for one, target in zip(bound, self._launches):
            self._fill(one, target)

    def _fill(self, one: Bound, target: Any) -> None:
        device, library_, kernel = self.device, one.library, one.kernel
        target.kernel = device.lib.pe_metal_find(kernel.name.encode())
        target.grid, target.threads, target.shared_bytes = one.grid, one.threads, one.shared_bytes
        for name, value in one.constants.items():
            c = library_.constants[name]
            target.constants[c.index] = struct.unpack("i", struct.pack("f", value))[0] if c.type == "float" else int(value)
        for index, (memory, offset, nbytes) in one.buffers.items():
            target.buffers[index], target.bytes[index] = memory.array.ctypes.data + offset, nbytes
        if kernel.arguments is not None:
            self._args.append(device.ffi.new("char[]", one.args))
            address = int(device.ffi.cast("uintptr_t", self._args[-1]))
            target.buffers[kernel.arguments.index], target.bytes[kernel.arguments.index] = address, len(one.args)

    def run(self, timed: bool = False) -> None:
        """Run all launches. Raises: GraphError with the emulator's words, for what a kernel does wrong."""
        done = self.device.lib.pe_metal_run(self._launches, self.n, self._message, MESSAGE_BYTES)
        if done != self.n:
            raise GraphError(self.device.ffi.string(self._message).decode(errors="replace"))

    def seconds(self) -> list[float]:
        """Return the seconds of each launch in the last run."""
        return [self._launches[i].seconds for i in range(self.n)]


class EmulatedDevice(Device):
    """See the module's docstring. checked: whether memory is watched (default: as $PYENGINE_EMULATE says); kernels: a folder of others."""

    name = "emulated Metal device"
    max_threadgroup_bytes = 32768

    def __init__(self, checked: bool | None = None, kernels: Path | None = None):
        watched = os.environ.get("PYENGINE_EMULATE") == "checked" if checked is None else checked
        self.ffi, self.lib = opened(watched, kernels)

    def memory(self) -> tuple[int, int]:
        """Return the bytes of $PYENGINE_EMULATED_MEMORY, 8 GiB without it, as free as main memory is."""
        total = int(os.environ.get("PYENGINE_EMULATED_MEMORY") or 8 << 30)
        return total, min(total, hardware.available_memory())

    def allocate(self, nbytes: int) -> Memory:
        """Return zeroed memory."""
        return HostMemory(nbytes)

    def mapped(self, array: np.ndarray) -> Memory:
        """Return these very bytes: all memory is the host's."""
        return MappedMemory(array)

    def record(self, bound: Sequence[Bound]) -> Recording:
        """Return launches that can be run again and again."""
        for one in bound:
            if one.shared_bytes > self.max_threadgroup_bytes:
                raise GraphError(f"metal: {one.kernel.name} wants {one.shared_bytes} bytes of threadgroup memory; "
                                 f"{self.max_threadgroup_bytes} are there")
        return EmulatedRecording(self, bound)
