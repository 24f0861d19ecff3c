"""Metal as pyobjc shows it, as far as pyengine/backends/metal/apple.py calls it, over the emulator: checks how a Mac's device is driven.

What Apple's framework does is written from its documentation. Kernels run with the function constants that stand in the text which was
"compiled", and with the buffers that were bound: what apple.py forgets to bind is null.
"""

from __future__ import annotations

import re
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from pyengine.backends.metal import apple, mac, sources
from pyengine.backends.metal.emulated import MESSAGE_BYTES, opened


class Raw:
    """pyobjc's varlist: memory of unknown length."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def as_buffer(self, n: int) -> memoryview:
        return memoryview(self.array[:n])


class Buffer:
    def __init__(self, array: np.ndarray):
        self.array = array

    def contents(self) -> Raw:
        return Raw(self.array)


class Named:
    """An object with setters that are noted: x.setFoo_(1) is x.values["Foo"]."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    @classmethod
    def alloc(cls) -> Named:
        return cls()

    def init(self) -> Named:
        return self

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        if not name.startswith("set"):
            raise AttributeError(name)
        return lambda value: self.values.__setitem__(name[3:].rstrip("_"), value)


class Library:
    def __init__(self, text: str):
        self.text = text

    def newFunctionWithName_(self, name: str) -> tuple[str, str]:
        assert re.search(rf"kernel\s+void\s+{name}\b", self.text), f"no function {name}"
        return name, self.text


class Pipeline:
    """A kernel with its constants, as they stand in its text."""

    def __init__(self, function: tuple[str, str], indirect: bool):
        name, text = function
        self.library, self.kernel = sources.kernel(name)
        self.indirect, self.constants = indirect, {}
        for c in self.library.constants.values():
            found = re.search(rf"constant {c.type} {c.name} = (\S+?);", text)
            assert found, f"{c.name} has no value"
            value = found[1]
            self.constants[c.index] = (struct.unpack("i", struct.pack("f", float(value.rstrip("f"))))[0] if c.type == "float"
                                       else {"true": 1, "false": 0}[value] if c.type == "bool" else int(value))
        self.nulls = {p.index for p in self.kernel.parameters if p.kind == "buffer" and re.search(rf"\b{p.name} = nullptr;", text)}

    def maxTotalThreadsPerThreadgroup(self) -> int:
        return 1024


class Command:
    """What an encoder, or a command of an indirect buffer, has been told."""

    def __init__(self) -> None:
        self.pipeline: Any = None
        self.buffers: dict[int, tuple[Buffer, int]] = {}
        self.shared, self.barrier, self.done = 0, False, []

    def setComputePipelineState_(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def setBuffer_offset_atIndex_(self, buffer: Buffer, offset: int, index: int) -> None:
        assert 0 <= offset <= buffer.array.nbytes and 0 <= index < 31
        self.buffers[index] = buffer, offset

    setKernelBuffer_offset_atIndex_ = setBuffer_offset_atIndex_

    def setThreadgroupMemoryLength_atIndex_(self, n: int, index: int) -> None:
        assert n % 16 == 0 and index == 0
        self.shared = n

    def setBarrier(self) -> None:
        self.barrier = True

    def concurrentDispatchThreadgroups_threadsPerThreadgroup_(self, grid: tuple[int, ...], threads: tuple[int, ...]) -> None:
        assert self.pipeline.indirect and self.barrier, "not made for indirect command buffers, or nothing orders it"
        self.done.append((grid, threads))

    def launch(self, grid: tuple[int, ...], threads: tuple[int, ...]) -> None:
        """Run it in the emulator, with the buffers that its kernel declares."""
        ffi, lib = opened(False)
        p = self.pipeline
        one, message = ffi.new("pe_metal_launch *"), ffi.new("char[]", MESSAGE_BYTES)
        one.kernel, one.grid, one.threads, one.shared_bytes = lib.pe_metal_find(p.kernel.name.encode()), grid, threads, self.shared
        for index, value in p.constants.items():
            one.constants[index] = value
        for parameter in (q for q in p.kernel.parameters if q.kind == "buffer" and q.index not in p.nulls):
            assert parameter.index in self.buffers, f"{p.kernel.name}: '{parameter.name}' is not bound"
            buffer, offset = self.buffers[parameter.index]
            one.buffers[parameter.index], one.bytes[parameter.index] = buffer.array.ctypes.data + offset, buffer.array.nbytes - offset
        assert lib.pe_metal_run(one, 1, message, MESSAGE_BYTES) == 1, ffi.string(message)


class Indirect:
    def __init__(self, n: int):
        self.commands = [Command() for _ in range(n)]

    def indirectComputeCommandAtIndex_(self, i: int) -> Command:
        return self.commands[i]


class Encoder(Command):
    def __init__(self, queue: Queue):
        super().__init__()
        self.queue, self.used, self.ended = queue, set(), False

    def dispatchThreadgroups_threadsPerThreadgroup_(self, grid: tuple[int, ...], threads: tuple[int, ...]) -> None:
        self.queue.todo.append((self, dict(self.buffers), self.pipeline, self.shared, grid, threads))
        self.shared = 0

    def useResource_usage_(self, buffer: Buffer, usage: int) -> None:
        assert usage == 3
        self.used.add(id(buffer))

    def executeCommandsInBuffer_withRange_(self, made: Indirect, range_: tuple[int, int]) -> None:
        for c in made.commands[range_[0] : sum(range_)]:
            assert all(id(b) in self.used for b, _ in c.buffers.values()), "a buffer that nobody declared as used"
            self.queue.todo.append((c, dict(c.buffers), c.pipeline, c.shared, *c.done[-1]))

    def endEncoding(self) -> None:
        self.ended = True


class Queue:
    """A command queue, and the one command buffer at a time that it gives."""

    def __init__(self) -> None:
        self.todo: list[Any] = []
        self.committed = 0

    def commandBuffer(self) -> Queue:
        assert not self.todo
        return self

    def computeCommandEncoder(self) -> Encoder:
        self.encoder = Encoder(self)
        return self.encoder

    def commit(self) -> None:
        assert self.encoder.ended
        self.committed += 1

    def waitUntilCompleted(self) -> None:
        for command, command.buffers, command.pipeline, command.shared, grid, threads in self.todo:
            command.launch(grid, threads)
        self.todo = []

    def status(self) -> int:
        return 4

    def GPUStartTime(self) -> float:
        return 1.0

    def GPUEndTime(self) -> float:
        return 1.5


class FakeDevice:
    def __init__(self) -> None:
        self.queue, self.compiled, self.mapped = Queue(), 0, 0

    def name(self) -> str:
        return "Fake M1"

    def supportsFamily_(self, family: int) -> bool:
        return family == 1007

    def maxThreadgroupMemoryLength(self) -> int:
        return 32768

    def recommendedMaxWorkingSetSize(self) -> int:
        return 8 << 30

    def newCommandQueue(self) -> Queue:
        return self.queue

    def newBufferWithLength_options_(self, n: int, options: int) -> Buffer:
        whole = np.full(n + 256, 0xA5, np.uint8)
        return Buffer(whole[-whole.ctypes.data % 256 :][:n])

    def newBufferWithBytesNoCopy_length_options_deallocator_(self, pages: np.ndarray, n: int, options: int, free: None) -> Buffer:
        assert pages.ctypes.data % 16384 == 0 and n % 16384 == 0 == n - pages.nbytes
        self.mapped += 1
        return Buffer(pages)

    def newLibraryWithSource_options_error_(self, text: str, options: Named, error: None) -> tuple[Library, None]:
        assert options.values == {"MathMode": 0}
        self.compiled += 1
        return Library(text), None

    def newComputePipelineStateWithDescriptor_options_reflection_error_(self, wanted: Named, *rest: Any) -> tuple[Pipeline, None]:
        return Pipeline(wanted.values["ComputeFunction"], wanted.values["SupportIndirectCommandBuffers"]), None

    def newIndirectCommandBufferWithDescriptor_maxCommandCount_options_(self, wanted: Named, n: int, options: int) -> Indirect:
        assert wanted.values["CommandTypes"] == 32 and not wanted.values["InheritBuffers"] and not wanted.values["InheritPipelineState"]
        return Indirect(n)


def install(monkeypatch: Any) -> FakeDevice:
    """Make this process look like a Mac with pyobjc, and return its GPU."""
    made = FakeDevice()
    metal = types.SimpleNamespace(
        MTLCreateSystemDefaultDevice=lambda: made, MTLGPUFamilyApple7=1007, MTLResourceStorageModeShared=0, MTLMathModeSafe=0,
        MTLCompileOptions=Named, MTLComputePipelineDescriptor=Named, MTLIndirectCommandBufferDescriptor=Named,
        MTLIndirectCommandTypeConcurrentDispatch=32, MTLCommandBufferStatusError=5, MTLSizeMake=lambda *n: n)
    for module in (apple, mac):
        monkeypatch.setattr(module, "sys", types.SimpleNamespace(platform="darwin", executable=sys.executable))
    monkeypatch.setitem(sys.modules, "Metal", metal)
    monkeypatch.setitem(sys.modules, "objc", types.SimpleNamespace(registerMetaDataForSelector=lambda *a: None))
    return made
