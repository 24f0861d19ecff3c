"""Numbers for Prometheus, read by its own parser: they are those of what was asked."""

from __future__ import annotations

import time
from typing import Any

import psutil
import pytest

from pyengine.server.app import application
from pyengine.server.metrics import Metrics
from pyengine.server.models import load, Models

pytest.importorskip("httpx")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402  which needs httpx


@pytest.fixture(scope="module")
def served(tiny_gguf) -> Any:
    found = load(str(tiny_gguf("llama")[0]), n_ctx=256, n_threads=1, n_seq=2)
    yield found
    found.model.close()


def numbers(client: Any) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {f"{s.name}{sorted(s.labels.items())}": s.value for family in text_string_to_metric_families(response.text) for s in family.samples}


def test_what_was_asked_is_counted(served) -> None:
    client = TestClient(application([served]), base_url="http://localhost:8080")
    before = numbers(client)
    served.model.reset()
    for stream in (False, True):
        asked = {"prompt": "Once upon", "max_tokens": 5, "stream": stream, "logit_bias": {str(t): -100 for t in served.model.tokenizer.eog_ids}}
        client.post("/v1/completions", json=asked)
    client.post("/v1/completions", json={})
    client.get("/v1/models/nothing")
    client.get("/some/where/else")
    client.get("/v1/models", headers={"Host": "evil.example"})
    after = numbers(client)
    n = len(served.model.tokenize("Once upon"))
    change = {k: v - before.get(k, 0) for k, v in after.items()}
    of = f"[('model', '{served.name}')]"
    assert change[f"pyengine_prompt_tokens_total{of}"] == 2 * n and change[f"pyengine_prompt_tokens_cached_total{of}"] == n - 1
    assert change[f"pyengine_generated_tokens_total{of}"] == 10
    assert change["pyengine_http_requests_total[('endpoint', '/v1/completions'), ('status', '200')]"] == 2
    assert change["pyengine_http_requests_total[('endpoint', '/v1/completions'), ('status', '400')]"] == 1
    assert change["pyengine_http_requests_total[('endpoint', '/v1/models/{name:path}'), ('status', '404')]"] == 1
    assert change["pyengine_http_requests_total[('endpoint', 'other'), ('status', '404')]"] == 1
    assert change["pyengine_http_requests_total[('endpoint', 'refused'), ('status', '403')]"] == 1
    assert change["pyengine_answers_total[('finish', 'length')]"] == 2
    assert change["pyengine_time_to_first_token_seconds_count[]"] == 2 and change["pyengine_time_between_tokens_seconds_count[]"] == 8
    assert 0 < change["pyengine_time_between_tokens_seconds_sum[]"] < change["pyengine_time_to_first_token_seconds_sum[]"] + 60
    assert after[f"pyengine_requests_running{of}"] == after[f"pyengine_requests_waiting{of}"] == 0
    planned = sum(v for k, v in after.items() if k.startswith("pyengine_planned_memory_bytes") and "'mapped'" not in k)
    assert planned == served.model.plan.total
    assert after["pyengine_resident_memory_bytes[]"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_applications_count_for_themselves_and_the_key_is_asked_for(served) -> None:
    one, other = (TestClient(application([served], api_keys=["k"]), base_url="http://localhost", headers={"X-API-Key": "k"}) for _ in range(2))
    one.get("/v1/models")
    key = "pyengine_http_requests_total[('endpoint', '/v1/models'), ('status', '200')]"
    assert key in numbers(one) and key not in numbers(other)
    assert TestClient(application([served], api_keys=["k"]), base_url="http://localhost").get("/metrics").status_code == 401


def test_a_token_costs_little(served) -> None:
    """Five microseconds at most, the note of its time included; some 0.3 are usual."""
    handle = served.model.submit("a", max_tokens=1)
    handle.result(20)
    counts, n = Metrics(Models([served])), 200_000
    append = handle.report.times.append
    started = time.process_time()
    for i in range(n):
        append(i * 0.004)
    counts.follow(handle, 0.0)
    assert (time.process_time() - started) / n < 5e-6
    assert numbers_of(counts)["pyengine_time_between_tokens_seconds_count"] >= n - 1


def numbers_of(counts: Metrics) -> dict[str, float]:
    return {s.name: s.value for family in counts.collect() for s in family.samples}
