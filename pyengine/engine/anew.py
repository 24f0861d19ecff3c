"""An open model laid out anew: with the same sizes, and caches that another policy of compression needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TYPE_CHECKING

from pyengine.memory.fit import fit, Fitted, refusal
from pyengine.memory.held import held

if TYPE_CHECKING:
    from pyengine.cache.compression.base import Compression


def fitted_anew(was: Fitted, policy: Compression, usual: Compression | None, model: Any) -> Fitted:
    """Lay a model out for what a policy reads; what it holds now will be free. Cells are as many as for the usual one. Raises: PlanError."""
    kept = {name: value for name, value in policy.parameters.items() if name not in ("ratio", "budget", "when")}
    cells = {"ratio": policy.ratio, "budget": policy.budget} if usual is None or usual.when == "prompt" else {"budget": usual.budget, "when": usual.when}
    policy = type(policy)(**kept, **cells)
    layout, own = was.layout, model.held()
    want = replace(layout.want, n_ctx=layout.sizes.n_ctx, n_seq=layout.sizes.n_seq, n_batch=layout.sizes.n_batch, compress=policy)
    others = [*held(without=[model]), *([own.gone()] if own else [])]
    fitted = fit(layout.bound, want, held=others)
    if not fitted.plan.fits:
        raise refusal(layout.bound, want, fitted, others)
    return fitted
