"""What devices can do, as their makers publish it, and how many threads fit on a multiprocessor of each kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Peaks of one device. Operations count a product and a sum as 2, of dense matrices; f16 is with sums in float32.

    mma: the part of the tensor cores' peak that mma.sync reaches (Hopper's full rate needs wgmma; M3 has no such unit)
    """

    name: str
    target: str              # for which kernels are compiled; "" for Metal
    bandwidth: float         # bytes/s
    int8: float              # operations/s
    f16: float
    f32: float
    mma: float
    source: str


PUBLISHED = (
    Published("RTX 3090", "86", 936e9, 284e12, 71e12, 35.6e12, 1.0, "NVIDIA Ampere GA102 GPU Architecture (whitepaper, 2021), table 2 and appendix A"),
    Published("RTX 4090", "89", 1008e9, 660.6e12, 165.2e12, 82.6e12, 1.0, "NVIDIA Ada GPU Architecture (whitepaper 2.1, 2023), appendix A"),
    Published("A100", "80", 2039e9, 624e12, 312e12, 19.5e12, 1.0, "NVIDIA A100 80GB SXM (data sheet, 2021)"),
    Published("H200", "90a", 4800e9, 1979e12, 989e12, 67e12, 0.63,
              "NVIDIA H200 SXM (data sheet, 2024: peaks with sparsity, halved here); mma.sync's part: arXiv:2402.13499, section 5"),
    Published("M3 Max", "", 400e9, 14.1e12, 14.1e12, 14.1e12, 1.0,
              "Apple, MacBook Pro (2023), technical specifications: 400 GB/s, 40 cores; peaks follow from 128 lanes a core at 1.38 GHz, which Apple does not publish"),
)


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one: threads, blocks, bytes of shared memory, and of one block. CUDA C++ Programming Guide 13, table 30."""

    threads: int
    blocks: int
    shared: int
    block_shared: int
    registers: int = 65536
    reserved: int = 1024     # bytes of shared memory that the system takes of each block


MULTIPROCESSORS = {
    "75": Multiprocessor(1024, 16, 64 << 10, 64 << 10, reserved=0),
    "80": Multiprocessor(2048, 32, 164 << 10, 163 << 10),
    "86": Multiprocessor(1536, 16, 100 << 10, 99 << 10),
    "89": Multiprocessor(1536, 24, 100 << 10, 99 << 10),
    "90a": Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    "100": Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    "120": Multiprocessor(1536, 24, 100 << 10, 99 << 10),
}


def occupancy(target: str, registers: int, threads: int, shared: int) -> float:
    """Return the share of a multiprocessor's threads that are resident; 0 for a block that does not fit.

    Registers are given out to warps in 256s, by four schedulers with a quarter of them each (CUDA's occupancy calculator).
    """
    m = MULTIPROCESSORS[target]
    if shared > m.block_shared or threads > 1024:
        return 0.0
    warps = -(-threads // 32)
    by_registers = 4 * (m.registers // 4 // (-(-max(registers, 1) * 32 // 256) * 256)) // warps
    by_shared = m.shared // (shared + m.reserved) if shared + m.reserved else m.blocks
    blocks = min(m.blocks, m.threads // (32 * warps), by_registers, by_shared)
    return blocks * warps * 32 / m.threads
