"""The GPU of a Mac, over pyobjc's Metal (`pip install pyobjc-framework-Metal`, or the extra `metal`).

A kernel is compiled from its text when it is first wanted, for the function constants and the null buffers of that launch; macOS keeps what
it compiled from one start to the next. Memory is shared: buffers are arrays of the host, and mapped files are read where they lie.

Launches are replayed from an indirect command buffer, so that a run is one command however many launches it has. pyobjc describes one
method of those wrongly (12.2: the sizes of `concurrentDispatchThreadgroups` as plain numbers); that is put right here, and tried out in
a process of its own before it is relied upon. $PYENGINE_METAL_REPLAY=encoder encodes each launch in each run instead.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pyengine import hardware
from pyengine.backends.metal.device import Bound, Device, Memory, Recording
from pyengine.backends.metal.mac import framework
from pyengine.backends.metal.sources import specialized
from pyengine.errors import GraphError, PlanError

PAGE = 16384                                                 # of Apple's processors
MOST_COMMANDS = 16384                                        # of an indirect command buffer
ARGS_ALIGN = 256                                             # of a buffer's offset in constant memory
READ_AND_WRITE = 3                                           # MTLResourceUsageRead | Write


class AppleMemory(Memory):
    """A Metal buffer; `start` bytes into it, `array` begins."""

    def __init__(self, buffer: Any, array: np.ndarray, start: int = 0):
        self.buffer, self.array, self.start = buffer, array, start


class AppleDevice(Device):
    """See the module's docstring."""

    def __init__(self) -> None:
        self.metal = framework()
        self.device = self.metal.MTLCreateSystemDefaultDevice()
        if self.device is None:
            raise GraphError("this Mac offers no Metal device to this process")
        if not self.device.supportsFamily_(self.metal.MTLGPUFamilyApple7):
            raise GraphError(f"{self.device.name()}: kernels need a GPU of the M1's family or later (simdgroup matrices)")
        self.name, self.max_threadgroup_bytes = str(self.device.name()), int(self.device.maxThreadgroupMemoryLength())
        self.queue = self.device.newCommandQueue()
        self._pipelines: dict[Any, Any] = {}

    @cached_property
    def indirect(self) -> bool:
        """Whether launches are replayed from indirect command buffers."""
        wanted = os.environ.get("PYENGINE_METAL_REPLAY")
        found = wanted == "indirect" or (wanted != "encoder" and replays())
        if found:
            correct_metadata()
        return found

    # -- memory -------------------------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """Return Metal's recommendedMaxWorkingSetSize, and what of it the system can give now."""
        total = int(self.device.recommendedMaxWorkingSetSize())
        return total, min(total, hardware.available_memory())

    def allocate(self, nbytes: int) -> Memory:
        """Return zeroed memory. Raises: PlanError where there is not so much."""
        buffer = self.device.newBufferWithLength_options_(max(nbytes, 16), self.metal.MTLResourceStorageModeShared)
        if buffer is None:
            raise PlanError(f"{self.name}: no buffer of {nbytes} bytes; the largest is {self.device.maxBufferLength()}")
        array = _view(buffer, max(nbytes, 16))
        array[:] = 0
        return AppleMemory(buffer, array[:nbytes])

    def mapped(self, array: np.ndarray) -> Memory | None:
        """Return memory over the pages that hold these bytes of a mapped file; None if the device does not take them."""
        address = array.ctypes.data
        first, end = address // PAGE * PAGE, -(-(address + array.nbytes) // PAGE) * PAGE
        pages = np.ctypeslib.as_array((ctypes.c_uint8 * (end - first)).from_address(first))
        buffer = self.device.newBufferWithBytesNoCopy_length_options_deallocator_(pages, end - first, self.metal.MTLResourceStorageModeShared,
                                                                                  None)
        if buffer is None or _view(buffer, end - first).ctypes.data != first:
            return None                                      # refused, or copied on the way
        return AppleMemory(buffer, array, address - first)

    # -- kernels ------------------------------------------------------------------------------------------------------

    def pipeline(self, one: Bound) -> Any:
        """Return the compiled kernel of a launch. Raises: GraphError with the compiler's words."""
        missing = tuple(p.name for p in one.kernel.parameters if p.kind == "buffer" and not p.args and p.index not in one.buffers)
        key = one.kernel.name, tuple(sorted(one.constants.items())), missing
        if key not in self._pipelines:
            options = self.metal.MTLCompileOptions.alloc().init()
            if hasattr(options, "setMathMode_"):                 # from macOS 15 on
                options.setMathMode_(self.metal.MTLMathModeSafe)
            else:
                options.setFastMathEnabled_(False)
            text = specialized(one.library, one.kernel, one.constants, missing)
            library, error = self.device.newLibraryWithSource_options_error_(text, options, None)
            if library is None:
                raise GraphError(f"metal: {one.kernel.name} does not compile: {error}")
            wanted = self.metal.MTLComputePipelineDescriptor.alloc().init()
            wanted.setComputeFunction_(library.newFunctionWithName_(one.kernel.name))
            wanted.setSupportIndirectCommandBuffers_(self.indirect)
            made = self.device.newComputePipelineStateWithDescriptor_options_reflection_error_(wanted, 0, None, None)
            if made[0] is None:
                raise GraphError(f"metal: {one.kernel.name}: {made[-1]}")
            self._pipelines[key] = made[0]
        made = self._pipelines[key]
        threads = one.threads[0] * one.threads[1] * one.threads[2]
        if threads > made.maxTotalThreadsPerThreadgroup():
            raise GraphError(f"metal: {one.kernel.name} wants {threads} threads; {made.maxTotalThreadsPerThreadgroup()} are possible here")
        return made

    def record(self, bound: Sequence[Bound]) -> Recording:
        """Return launches that can be run again and again."""
        return AppleRecording(self, bound)


def _view(buffer: Any, nbytes: int) -> np.ndarray:
    """Return the bytes of a buffer, which the host and the GPU share."""
    return np.frombuffer(buffer.contents().as_buffer(nbytes), np.uint8)


class AppleRecording(Recording):
    """Launches with their pipelines; all their arguments lie in one buffer."""

    def __init__(self, device: AppleDevice, bound: Sequence[Bound]):
        self.device, self.bound = device, list(bound)
        self.pipelines = [device.pipeline(one) for one in self.bound]
        places, total = [], 0
        for one in self.bound:
            places.append(total)
            total += -(-len(one.args) // ARGS_ALIGN) * ARGS_ALIGN
        self.args, self.places = device.allocate(total), places
        for one, place in zip(self.bound, places):
            self.args.array[place : place + len(one.args)] = np.frombuffer(one.args, np.uint8)
        memories = [self.args, *(m for one in self.bound for m, _, _ in one.buffers.values())]
        self.buffers = list({id(m): m.buffer for m in memories}.values())
        self._seconds = [0.0] * len(self.bound)
        self.commands = [self._indirect(i) for i in range(0, len(self.bound), MOST_COMMANDS)] if device.indirect else []

    def _sizes(self, one: Bound) -> tuple[Any, Any]:
        make = self.device.metal.MTLSizeMake
        return make(*one.grid), make(*one.threads)

    def _bindings(self, i: int) -> list[tuple[Any, int, int]]:
        """Return (buffer, offset, number) of each buffer of a launch."""
        one = self.bound[i]
        found = [(m.buffer, m.start + offset, number) for number, (m, offset, _) in one.buffers.items()]
        if one.kernel.arguments is not None:
            found.append((self.args.buffer, self.places[i], one.kernel.arguments.index))
        return found

    def _indirect(self, first: int) -> tuple[Any, int]:
        """Return an indirect command buffer of the launches from `first` on, and how many they are."""
        metal, n = self.device.metal, min(MOST_COMMANDS, len(self.bound) - first)
        wanted = metal.MTLIndirectCommandBufferDescriptor.alloc().init()
        wanted.setCommandTypes_(metal.MTLIndirectCommandTypeConcurrentDispatch)
        wanted.setInheritBuffers_(False)
        wanted.setInheritPipelineState_(False)
        wanted.setMaxKernelBufferBindCount_(31)
        if hasattr(wanted, "setMaxKernelThreadgroupMemoryBindCount_"):
            wanted.setMaxKernelThreadgroupMemoryBindCount_(1)
        made = self.device.device.newIndirectCommandBufferWithDescriptor_maxCommandCount_options_(wanted, n, 0)
        for i in range(n):
            one, command = self.bound[first + i], made.indirectComputeCommandAtIndex_(i)
            command.setComputePipelineState_(self.pipelines[first + i])
            for buffer, offset, number in self._bindings(first + i):
                command.setKernelBuffer_offset_atIndex_(buffer, offset, number)
            if one.shared_bytes:
                command.setThreadgroupMemoryLength_atIndex_(-(-one.shared_bytes // 16) * 16, 0)
            command.setBarrier()                             # after all before it
            command.concurrentDispatchThreadgroups_threadsPerThreadgroup_(*self._sizes(one))
        return made, n

    def run(self, timed: bool = False) -> None:
        """Run all launches and wait. `timed`: each as a command buffer of its own. Raises: GraphError with the device's words."""
        if timed:
            for i in range(len(self.bound)):
                self._seconds[i] = self._committed(lambda encoder, i=i: self._encode(encoder, i))
        elif self.device.indirect:
            self._committed(self._execute)
        else:
            self._committed(lambda encoder: [self._encode(encoder, i) for i in range(len(self.bound))])

    def _committed(self, fill: Any) -> float:
        """Fill a command buffer, commit it, wait, and return the seconds that the GPU was at it."""
        buffer = self.device.queue.commandBuffer()
        encoder = buffer.computeCommandEncoder()             # serial: a dispatch sees what those before it wrote
        fill(encoder)
        encoder.endEncoding()
        buffer.commit()
        buffer.waitUntilCompleted()
        if buffer.status() == self.device.metal.MTLCommandBufferStatusError:
            raise GraphError(f"{self.device.name}: {buffer.error()}")
        return float(buffer.GPUEndTime() - buffer.GPUStartTime())

    def _execute(self, encoder: Any) -> None:
        for buffer in self.buffers:
            encoder.useResource_usage_(buffer, READ_AND_WRITE)
        for commands, n in self.commands:
            encoder.executeCommandsInBuffer_withRange_(commands, (0, n))

    def _encode(self, encoder: Any, i: int) -> None:
        one = self.bound[i]
        encoder.setComputePipelineState_(self.pipelines[i])
        for buffer, offset, number in self._bindings(i):
            encoder.setBuffer_offset_atIndex_(buffer, offset, number)
        if one.shared_bytes:
            encoder.setThreadgroupMemoryLength_atIndex_(-(-one.shared_bytes // 16) * 16, 0)
        encoder.dispatchThreadgroups_threadsPerThreadgroup_(*self._sizes(one))

    def seconds(self) -> list[float]:
        """Return the seconds of each launch in the last timed run."""
        return list(self._seconds)


# -- indirect command buffers -----------------------------------------------------------------------------------------------------------


def correct_metadata() -> None:
    """Tell pyobjc what the arguments of an indirect dispatch are."""
    import objc

    size = b"{MTLSize=QQQ}"
    objc.registerMetaDataForSelector(b"NSObject", b"concurrentDispatchThreadgroups:threadsPerThreadgroup:",
                                     {"arguments": {2: {"type": size}, 3: {"type": size}}})


@lru_cache(maxsize=1)
def replays() -> bool:
    """Say whether indirect command buffers work here: a process of its own tries, because a wrong call would end it."""
    environment = {**os.environ, "PYENGINE_METAL_REPLAY": "indirect"}
    tried = subprocess.run([sys.executable, "-m", "pyengine.backends.metal.trial"], env=environment, capture_output=True, check=False)
    if tried.returncode:
        import logging

        logging.getLogger("pyengine").warning("metal: indirect command buffers do not work here, so each launch is encoded in each run: %s",
                                              tried.stderr.decode(errors="replace").strip()[-400:] or f"status {tried.returncode}")
    return tried.returncode == 0
