"""A layer's cache in a graph."""

from __future__ import annotations

from pyengine import ops
from pyengine.errors import GraphError, UnsupportedModelError
from pyengine.graph.tensor import Tensor
from pyengine.ops.attention import SUMS
from pyengine.records import NamedTuple


class LayerCache(NamedTuple):
    """One layer's cache: states k, v [kv heads, cells, head_dim], and the run-time inputs of its policy."""

    k: Tensor
    v: Tensor
    table: Tensor            # I32 [conversations, cells of one]: where tokens of a conversation lie
    cells: Tensor            # I32 [m]: where the rows of this step are written
    seq: Tensor              # I32 [m]: the conversation of each row
    lo: Tensor               # I32 [m]: the interval of tokens that it sees
    hi: Tensor
    sums: Tensor | None = None         # a state [kv heads, conversations * cells of one, c], if it is known what attention gives each token:
    weights: Tensor | None = None      # F32 [m, c]: what each row of this step counts,
    kinds: tuple[str, ...] = ()        # which statistic each of the c is, of `ops.attention.SUMS`,
    changed: list[Tensor] | None = None        # and where every reading leaves the changed state, which must be an output of the graph

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0, sinks: Tensor | None = None,
               k_common: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Write k, v [m, kv heads, head_dim] and attend with q [m, heads, head_dim]; returns [m, heads * head_dim].

        k_common [kv heads, head_dim]: what all keys have in common, if much. A cache of blocks stores keys without it, because it
        would make their scales coarser: it adds the same to all scores of a query, which softmax does not see.
        """
        left_out = k_common if self.k.dtype.block > 1 and not softcap and sinks is None else None
        return self.append(k, v, left_out).read(q, scale=scale, softcap=softcap, sinks=sinks, bias=bias)

    def append(self, k: Tensor, v: Tensor, left_out: Tensor | None = None) -> LayerCache:
        """Write k, less `left_out`, and v [m, kv heads, head_dim]; returns the cache that holds them too, for any layer that reads it."""
        return self._replace(k=ops.cache_append(self.k, k, self.cells, left_out), v=ops.cache_append(self.v, v, self.cells))

    def read(self, q: Tensor, *, scale: float, softcap: float = 0.0, sinks: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Attend with q [m, heads, head_dim] to what is there; returns [m, heads * head_dim]."""
        own = {} if bias is None else {"bias": bias}
        seen = (q, self.k, self.v, self.lo, self.hi, self.table, self.seq, sinks)
        if self.sums is None:
            return ops.attention(*seen, scale=scale, softcap=softcap, **own)
        if bias is not None:
            raise GraphError("cache: sums over what attention gives take no bias")
        out, stats = ops.attention(*seen, scale=scale, softcap=softcap, stats=True)
        add_sums(self, Part(self.k, self.v, self.table, self.lo, self.hi), q, stats, scale, softcap)
        return out


class Part(NamedTuple):
    """One of several stores of a layer's keys and values: states [kv heads, cells, head_dim], and what rows see of it."""

    k: Tensor
    v: Tensor
    table: Tensor            # I32 [conversations, cells of one]
    lo: Tensor               # I32 [m]
    hi: Tensor
    whole: Tensor | None = None        # I32 [conversations, cells of one in groups]: the same of a ring by the numbers of all tokens


class GroupedCache(NamedTuple):
    """The cache of a layer whose keys are quantized by channel, in groups of tokens (`cache.policy.Grouped`).

    A step writes its rows to `recent`, then the groups that its rows read first, and attends to all three parts at once.
    """

    groups: Part
    recent: Part             # the last tokens in full
    pinned: Part             # and the first ones
    cells: Tensor            # I32 [m]: where the rows of this step are written in `recent`
    seq: Tensor              # I32 [m]: the conversation of each row
    source: Tensor           # I32 [z]: where in `recent` each group begins that is written,
    target: Tensor           # I32 [z]: where in `groups`
    first: Tensor            # I32 [z]: and where in `pinned`; -1: not there
    sums: Tensor | None = None         # as in `LayerCache`, by the numbers of all tokens
    weights: Tensor | None = None
    kinds: tuple[str, ...] = ()
    changed: list[Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0, sinks: Tensor | None = None,
               k_common: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Write k, v [m, kv heads, head_dim] and attend with q [m, heads, head_dim]; returns [m, heads * head_dim].

        k_common: not needed, because a channel's minimum is stored.
        """
        return self.append(k, v).read(q, scale=scale, softcap=softcap, sinks=sinks, bias=bias)

    def append(self, k: Tensor, v: Tensor) -> GroupedCache:
        """Write k and v [m, kv heads, head_dim]; returns the cache that holds them too."""
        new = self.recent._replace(k=ops.cache_append(self.recent.k, k, self.cells), v=ops.cache_append(self.recent.v, v, self.cells))
        made = [part._replace(**dict(zip("kv", ops.cache_groups(part.k, part.v, new.k, new.v, self.source, target))))
                for part, target in ((self.groups, self.target), (self.pinned, self.first))]
        return self._replace(groups=made[0], recent=new, pinned=made[1])

    def read(self, q: Tensor, *, scale: float, softcap: float = 0.0, sinks: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Attend with q [m, heads, head_dim] to what is there; returns [m, heads * head_dim]. Raises: UnsupportedModelError with a bias.

        A token is in full for earlier rows, and in a group for later ones: sums of the last tokens first are sums row by row.
        """
        if bias is not None:
            raise UnsupportedModelError("attention with a bias by distance has no cache whose keys are quantized by channel; use kv_dtype='f16'")
        seen = [ops.attention(q, *part[:2], part.lo, part.hi, part.table, self.seq, sinks if part is self.recent else None,
                              scale=scale, softcap=softcap, stats=True) for part in (self.pinned, self.groups, self.recent)]
        parts, stats = [out for out, _ in seen], [stats for _, stats in seen]
        if self.sums is None:
            return ops.merge_attention(parts, stats)
        out, together = ops.merge_attention(parts, stats, together=True)
        for part in (self.recent, self.groups, self.pinned):
            add_sums(self, part, q, together, scale, softcap)
        return out


def add_sums(cache: LayerCache | GroupedCache, part: Part, q: Tensor, stats: Tensor, scale: float, softcap: float) -> None:
    """Add what the rows of a step give to the keys of a part, and note the changed state. Raises: GraphError where the cache has no place for it."""
    if cache.weights is None or cache.changed is None:
        raise GraphError("cache: sums over what attention gives need weights, and a list for the changed state")
    before = cache.changed[-1] if cache.changed else cache.sums
    table = part.table if part.whole is None else part.whole
    cache.changed.append(ops.key_sums(before, q, part.k, part.lo, part.hi, table, cache.seq, stats, cache.weights, scale=scale, softcap=softcap,
                                      kinds=tuple(SUMS.index(kind) for kind in cache.kinds)))


class CrossCache(NamedTuple):
    """The cache of a layer that attends across: states k, v [kv heads, cells, head_dim], and the run-time inputs of a step.

    c encoder rows are added in a step, s rows of text see any.
    """

    k: Tensor
    v: Tensor
    table: Tensor            # I32 [conversations, cells of one]
    cells: Tensor            # I32 [c]: where encoder rows are written
    seq: Tensor              # I32 [s]; where all rows see encoder rows, [m] here and below
    lo: Tensor               # I32 [s]
    hi: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """Write k, v [c, kv heads, head_dim] and attend with q [s, heads, head_dim]; returns [s, heads * head_dim]."""
        k_all, v_all = ops.cache_append(self.k, k, self.cells), ops.cache_append(self.v, v, self.cells)
        return ops.attention(q, k_all, v_all, self.lo, self.hi, self.table, self.seq, scale=scale)


class RecurrentCache(NamedTuple):
    """What a recurrent layer keeps: states [heads, cells, elements], and the cells of the states before and after each row of a step."""

    states: tuple[Tensor, ...]
    before: Tensor           # I32 [m], as `ops.recurrent` says
    after: Tensor            # I32 [m]
