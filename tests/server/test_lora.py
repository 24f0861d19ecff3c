"""Adapters over HTTP, as llama.cpp's server has them: scales of all requests, and of one."""

from __future__ import annotations

from typing import Any

import pytest

import lora
from pyengine.errors import RequestError
from pyengine.server import replies
from pyengine.server.models import load

pytest.importorskip("httpx")
pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")


@pytest.fixture(scope="module")
def served(tiny_gguf, tmp_path_factory) -> Any:
    from converters.adapters import convert_adapter

    path, hf = tiny_gguf("llama")
    folder = tmp_path_factory.mktemp("lora")
    files = [convert_adapter(lora.make_adapter(folder / name, hf, seed=i), hf, folder / f"{name}.gguf") for i, name in enumerate(("one", "two"))]
    found = load(str(path), n_ctx=256, n_threads=1, n_seq=2, adapters=[files[0], (files[1], 0.5)])
    yield found
    found.model.close()


def test_scales_are_told_and_set(client, model) -> None:
    assert client.get("/lora-adapters").json() == [{"id": 0, "path": "one", "scale": 1.0}, {"id": 1, "path": "two", "scale": 0.5}]
    try:
        assert client.post("/lora-adapters", json=[{"id": 1, "scale": 0.25}]).json()[0] == {"id": 0, "path": "one", "scale": 0.0}
        assert model.adapters == {"one": 0.0, "two": 0.25}
        assert client.post("/lora-adapters", json=[]).json()[1]["scale"] == 0.0
    finally:
        model.use_adapters({"one": 1.0, "two": 0.5})


@pytest.mark.parametrize(("lora_", "adapters"), [(None, None), ([], {}), ([{"id": 0, "scale": 0.3}], {"one": 0.3}),
                                                 ([{"id": 1, "scale": 1}, {"id": 0, "scale": -1}], {"one": -1.0, "two": 1.0})])
def test_a_request_has_scales_of_its_own(client, model, lora_: Any, adapters: Any) -> None:
    asked = {"prompt": "Once upon", "temperature": 0, **({} if lora_ is None else {"lora": lora_})}
    want = model.generate("Once upon", max_tokens=6, temperature=0, adapters=adapters)
    assert client.post("/completion", json={**asked, "n_predict": 6}).json()["content"] == want
    assert client.post("/v1/completions", json={**asked, "max_tokens": 6}).json()["choices"][0]["text"] == want
    messages = [{"role": "user", "content": "Hi"}]
    got = client.post("/v1/chat/completions", json={**asked, "messages": messages, "max_tokens": 6}).json()["choices"][0]["message"]["content"]
    assert got == model.chat(messages, max_tokens=6, temperature=0, adapters=adapters)


@pytest.mark.parametrize(("given", "says"), [
    ({"id": 0}, "list"), ([{"id": 0}], "lora[0]"), ([7], "lora[0]"), ([{"id": "x", "scale": 1}], "lora[0].id"), ([{"id": 2, "scale": 1}], "no 2; loaded are one, two"),
    ([{"id": 0, "scale": "1"}], "lora[0].scale"), ([{"id": 0, "scale": True}], "lora[0].scale"), ([{"id": -1, "scale": 1}], "lora[0].id"),
])
def test_wrong_scales_are_refused(client, model, given: Any, says: str) -> None:
    for response in (client.post("/completion", json={"prompt": "x", "lora": given}), client.post("/lora-adapters", json=given)):
        assert response.status_code == 400 and says in response.json()["error"]["message"]
    assert client.post("/lora-adapters", content=b"]").status_code == 400
    assert model.adapters == {"one": 1.0, "two": 0.5}


def test_errors_name_the_field_and_the_option(client, model, tiny_gguf) -> None:
    """A client sees no names of the library's arguments."""
    asked = {"max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}], "lora": [{"id": 2, "scale": 1}]}
    error = client.post("/v1/chat/completions", json=asked).json()["error"]
    assert error["param"] == "lora" and error["message"] == "lora: there is no 2; loaded are one, two"
    assert client.post("/lora-adapters", json=asked["lora"]).json()["error"]["message"] == "lora: there is no 2; loaded are one, two"
    bare = load(str(tiny_gguf("llama")[0]), n_ctx=64, n_threads=1)
    try:
        with pytest.raises(RequestError) as told:
            bare.model.use_adapters({0: 1.0})
    finally:
        bare.model.close()
    assert str(told.value).endswith("none: load with adapters=") and replies.told(str(told.value)).endswith("none: serve the model with --lora")
