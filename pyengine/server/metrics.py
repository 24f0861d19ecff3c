"""Numbers for Prometheus at /metrics: each application counts for itself, and what models count is read when it is asked for.

Times of tokens are noted by the engine and counted when an answer ends, so a token costs an append.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pyengine.engine.loop import Handle
from pyengine.errors import PyEngineError
from pyengine.server.models import Models

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)            # seconds
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_COUNTS = (("prompt_tokens", "prompt_tokens", "Tokens of prompts."), ("cached_tokens", "prompt_tokens_cached", "Tokens of prompts that were found in the caches."),
           ("generated_tokens", "generated_tokens", "Tokens that were generated."),
           ("drafted_tokens", "drafted_tokens", "Tokens that were computed before they were known."),
           ("accepted_tokens", "accepted_tokens", "Those of them that came."), ("steps", "steps", "Steps of the model."),
           ("image_misses", "images_encoded", "Pictures and videos that were encoded."), ("image_hits", "images_cached", "Pictures and videos that were encoded already."))


class _Histogram:
    """Numbers of values by upper bounds, added many at a time."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, values: Iterable[float]) -> None:
        """Count values."""
        bounds, counts = self._bounds, self._counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            self._sum += value

    def family(self, name: str, text: str) -> Any:
        """Return it as Prometheus has it: how many are at most each bound."""
        from prometheus_client.core import HistogramMetricFamily

        total, buckets = 0, []
        for bound, n in zip((*map(str, self._bounds), "+Inf"), self._counts):
            total += n
            buckets.append((bound, total))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._sum)


class Metrics:
    """What one application has done."""

    def __init__(self, models: Models):
        from prometheus_client import CollectorRegistry

        self._models = models
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._finishes: Counter[str] = Counter()
        self._first, self._between = _Histogram(FIRST), _Histogram(BETWEEN)
        self._registry = CollectorRegistry()
        self._registry.register(self)                        # type: ignore[arg-type]

    def route(self) -> Route:
        """Return the route of /metrics."""
        from prometheus_client import generate_latest
        from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

        async def metrics(request: Request) -> Response:
            return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

        return Route("/metrics", metrics)

    def count(self, endpoint: str, status: int) -> None:
        """Count an answered request; the endpoint is a route's path, not what was asked for, of which there may be any number."""
        with self._lock:
            self._requests[endpoint, str(status)] += 1

    def follow(self, handle: Handle, began: float) -> None:
        """Count an answer when it ends. began: by `time.perf_counter`, when it was asked for."""
        def ended(done: Handle) -> None:
            times = done.report.times
            with self._lock:
                self._finishes["error" if done.error is not None else done.report.finish] += 1
                self._first.add([times[0] - began] if times else ())
                self._between.add(b - a for a, b in pairwise(times))

        handle.on_done(ended)

    def describe(self) -> Iterator[Any]:
        """Name nothing beforehand, as the registry asks: there are no other collectors."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        """Yield all numbers."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            requests, finishes = dict(self._requests), dict(self._finishes)
            yield self._first.family("pyengine_time_to_first_token_seconds", "Seconds from a request to its first token.")
            yield self._between.family("pyengine_time_between_tokens_seconds", "Seconds from a token to the next one.")
        family = CounterMetricFamily("pyengine_http_requests", "Answered requests.", labels=["endpoint", "status"])
        for key, n in requests.items():
            family.add_metric(key, n)
        yield family
        family = CounterMetricFamily("pyengine_answers", "Answers by how they ended.", labels=["finish"])
        for finish, n in finishes.items():
            family.add_metric([finish], n)
        yield family
        yield from self._of_models()
        import psutil

        yield GaugeMetricFamily("pyengine_resident_memory_bytes", "Resident memory of the process.", value=psutil.Process().memory_info().rss)
        yield GaugeMetricFamily("pyengine_time_seconds", "Seconds since 1970.", value=time.time())

    def _of_models(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        loaded, stats = [], {}
        for s, _ in self._models.running():
            try:
                stats[s.name] = s.model.stats
            except PyEngineError:                            # it is being unloaded
                continue
            loaded.append((s.name, s.model))
        for key, name, text in _COUNTS:
            family = CounterMetricFamily(f"pyengine_{name}", text, labels=["model"])
            for model, counts in stats.items():
                family.add_metric([model], counts.get(key, 0))
            yield family
        running = GaugeMetricFamily("pyengine_requests_running", "Requests that are worked on.", labels=["model"])
        waiting = GaugeMetricFamily("pyengine_requests_waiting", "Requests that wait for a place.", labels=["model"])
        planned = GaugeMetricFamily("pyengine_planned_memory_bytes", "Memory of the model's plan.", labels=["model", "device", "purpose"])
        for name, model in loaded:
            if hasattr(type(model), "loop"):                  # models of encoders queue nothing
                running.add_metric([name], model.loop.n_running)
                waiting.add_metric([name], model.loop.n_waiting)
            sizes: Counter[tuple[str, str]] = Counter()
            for item in model.plan.items:
                sizes[item.device, item.purpose] += item.nbytes
            for (device, purpose), n in sizes.items():
                planned.add_metric([name, device, purpose], n)
        yield from (running, waiting, planned)


_metrics: ContextVar[Metrics | None] = ContextVar("metrics", default=None)
set_metrics = _metrics.set
metrics = _metrics.get
