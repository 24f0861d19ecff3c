"""Launches of csrc/metal/rows.metal."""

from __future__ import annotations

from pyengine.backends.metal.launch import ceil_div, elements, Launch, launches, NoKernel, spread, Step
from pyengine.native import lib

UNREADABLE = ("Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64")      # of which no format of a file has a dequantizer


@launches
def rows(s: Step) -> list[Launch]:
    """Launch a thread for eight elements, for 16 of a packed table. Raises: NoKernel for formats that are no weights."""
    (table, ids, media), out = s.singles(), s.outputs[0]
    n, width = table.shape
    plain = table.dtype.unpacked
    if plain.name in UNREADABLE:
        raise NoKernel(f"{s.name}: tables of {table.dtype} cannot be read")
    if out.size == 0:
        return []
    nbytes = int(lib.pe_pack_group_bytes(plain.id, width)) if table.dtype.is_packed else table.strides[0]
    args = dict(rows=out.shape[0], width=width, n=n, media=media.shape[0] if media else 0, bytes=nbytes, scale=s.params.scale,
                block=plain.block, block_bytes=plain.nbytes, id_step=elements(ids)[0], media_step=elements(media)[0] if media else 0,
                out_step=elements(out)[0])
    grid, threads = spread(ceil_div(width, 32) * 2 if table.dtype.is_packed else ceil_div(width, 8))
    buffers = dict(table=table, ids=ids, media=media, out=out)
    return [Launch("gather_packed" if table.dtype.is_packed else "gather_rows", args, buffers, (grid[0], out.shape[0], 1), threads,
                   constants={"FORMAT": plain.id})]
