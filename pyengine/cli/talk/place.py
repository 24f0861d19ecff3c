"""Where a chat's model is when it is not in this process: apart from `remote`, since HTTP and TLS take 15 ms to import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RemotePlan:
    """What stands in the place of a memory plan: the server has that. `n_ctx`: None where it does not say."""

    model: str
    url: str
    n_ctx: int | None

    def short(self) -> str:
        """Say where the model is."""
        return f"of the server, {self.url}"

    def table(self) -> str:
        """Say where the model is."""
        return f"the model is in the memory of the server, {self.url}"
