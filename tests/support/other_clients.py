"""More cases of `clients.CASES`: ollama, anthropic."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from clients import ASKED, BOB, case, CHAT, comes_to_rest, PARAMETERS, PERSON, PICTURE, raised, RIVER, SEES, square, STORY, TOOLS, working

SHORT, GREEDY = {"temperature": 0, "num_predict": 8}, {"temperature": 0, "num_predict": 60}
SHAPES = "what shapes are there?"


# -- ollama ----------------------------------------------------------------------------------------------------------------


def _ollama(url: str, **more: Any) -> Any:
    import ollama

    return ollama.Client(host=url, **more)


@case("ollama")
def ollama_chat(url: str) -> None:
    client = _ollama(url)
    whole = client.chat(model=CHAT, messages=RIVER, options=SHORT, keep_alive="5m", think=False)
    pieces = list(client.chat(model=CHAT, messages=RIVER, options=SHORT, stream=True))
    assert whole.message.content == "".join(p.message.content for p in pieces) and pieces[-1].done and pieces[-1].eval_count == whole.eval_count
    assert whole.done_reason in ("stop", "length") and whole.total_duration > whole.eval_duration > 0
    scored = client.chat(model=CHAT, messages=RIVER, options=SHORT, logprobs=True, top_logprobs=2)
    assert len(scored.logprobs) == scored.eval_count and len(scored.logprobs[0].top_logprobs) == 2


@case("ollama")
def ollama_tools(url: str) -> None:
    import ollama

    def get_weather(city: str) -> str:
        """Get the weather.

        Args:
          city: name of the city
        """
        return "18 C in " + city

    client = _ollama(url)
    said = client.chat(model=TOOLS, messages=ASKED, tools=[get_weather], options=GREEDY).message
    (call,) = said.tool_calls
    assert get_weather(**call.function.arguments) == "18 C in Paris"
    pieces = list(client.chat(model=TOOLS, messages=ASKED, tools=[get_weather], options=GREEDY, stream=True))
    assert [c.function.name for p in pieces for c in p.message.tool_calls or ()] == ["get_weather"]
    plain = ollama.Message(role="assistant", content="", tool_calls=[ollama.Message.ToolCall(function=call.function)])
    for turn, result in ((said, {"role": "tool", "content": "18 C", "tool_name": "get_weather"}), (plain, {"role": "tool", "content": "18 C", "name": "get_weather"})):
        assert client.chat(model=TOOLS, messages=[*ASKED, turn, result], tools=[get_weather], options={"num_predict": 2}).done


@case("ollama")
def ollama_format(url: str) -> None:
    client = _ollama(url)
    for form in (PERSON, "json"):
        assert json.loads(client.chat(model=TOOLS, messages=BOB, format=form, options=GREEDY).message.content)
    pieces = client.generate(model=TOOLS, prompt=BOB[0]["content"], format=PERSON, options=GREEDY, stream=True)
    assert json.loads("".join(p.response for p in pieces))["age"] == 5


@case("ollama")
def ollama_pictures(url: str) -> None:
    client, raw = _ollama(url), square()
    said = [client.chat(model=SEES, messages=[{"role": "user", "content": SHAPES, "images": [image]}], options=SHORT).message.content
            for image in (raw, PICTURE)]
    assert said[0] == said[1] == client.generate(model=SEES, prompt=SHAPES, images=[raw], options=SHORT).response


@case("ollama")
def ollama_generate(url: str) -> None:
    client = _ollama(url)
    assert client.generate(model=CHAT, prompt="Name a river.", system="Be brief.", options=SHORT).response
    assert client.generate(model=TOOLS, prompt="def f(", suffix="return 1", options={"num_predict": 4}).response
    settings = {"num_predict": 2, "num_ctx": 512, "num_gpu": 1, "num_thread": 2, "num_keep": 5, "mirostat": 0, "top_k": -1, "typical_p": 0.9, "repeat_last_n": -1,
                "seed": 5, "stop": ["zz"], "use_mmap": True, "penalize_newline": True}
    assert client.generate(model=CHAT, prompt="def f(", raw=True, options=settings, logprobs=True).logprobs
    assert client.generate(model=CHAT).done_reason == "load"


@case("ollama")
def ollama_lists(url: str) -> None:
    client = _ollama(url)
    assert {m.model for m in client.list().models} == {CHAT, TOOLS, SEES} and all(len(m.digest) >= 12 for m in client.list().models)
    assert {m.model for m in client.ps().models} == {CHAT, TOOLS, SEES} and client.ps().models[0].expires_at
    shown = client.show(TOOLS)
    assert {"completion", "tools", "insert"} <= set(shown.capabilities) and shown.modelinfo["general.architecture"] == "qwen2"
    assert "vision" in client.show(SEES).capabilities


@case("ollama")
def ollama_embeds(url: str) -> None:
    client = _ollama(url)
    assert len(client.embed(model=CHAT, input="hello").embeddings) == 1
    assert [len(v) for v in client.embed(model=CHAT, input=["a", "b"], truncate=False, dimensions=64).embeddings] == [64, 64]
    assert client.embeddings(model=CHAT, prompt="hello").embedding


@case("ollama")
def ollama_errors(url: str) -> None:
    import ollama

    client, error = _ollama(url), ollama.ResponseError
    assert raised(error, lambda: client.chat(model="nope", messages=RIVER)).status_code == 404
    assert raised(error, lambda: list(client.chat(model="nope", messages=RIVER, stream=True))).status_code == 404
    for change, part in (({"think": True}, "think"), ({"format": {"type": "nope"}}, "format.type"), ({"options": {"temperature": "x"}}, "options.temperature"),
                         ({"messages": [{"role": "user", "content": "a " * 2500}]}, "context")):
        got = raised(error, lambda c=change: client.chat(**{"model": CHAT, "messages": RIVER, **c}))
        assert got.status_code == 400 and part in got.error
    for call in (lambda: client.delete(CHAT), lambda: client.copy(CHAT, "x"), lambda: client.create(model="x", from_=CHAT), lambda: client.push("x"),
                 lambda: client.pull("x")):
        assert raised(error, call).status_code == 400


@case("ollama", recorded=False)
def ollama_leaves(url: str) -> None:
    import httpx
    import ollama

    stream = _ollama(url).chat(model=TOOLS, messages=STORY, stream=True)
    next(stream)
    assert working(url)
    stream.close()
    comes_to_rest(url)
    raised(httpx.TimeoutException, lambda: _ollama(url, timeout=0.2).chat(model=TOOLS, messages=STORY))
    comes_to_rest(url)

    async def main() -> None:
        client = ollama.AsyncClient(host=url)
        assert (await client.chat(model=CHAT, messages=RIVER, options=SHORT)).done
        pieces = await client.chat(model=CHAT, messages=RIVER, options=SHORT, stream=True)
        assert [piece async for piece in pieces][-1].done

    asyncio.run(main())


# -- anthropic -------------------------------------------------------------------------------------------------------------


TOOL = {"name": "get_weather", "description": "Get the weather of a city.", "input_schema": PARAMETERS}


def _anthropic(url: str) -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True)


def _asked(model: str = CHAT, **more: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": 8 if model == CHAT else 60, "messages": RIVER if model == CHAT else ASKED,
            "extra_body": {"temperature": 0, "top_k": 5}, **more}


@case("anthropic")
def messages(url: str) -> None:
    client, marked = _anthropic(url), {"cache_control": {"type": "ephemeral"}}
    made = client.messages.create(**_asked(system=[{"type": "text", "text": "Be brief.", **marked}], metadata={"user_id": "x"}, stop_sequences=["zz"],
                                           service_tier="auto", thinking={"type": "disabled"}))
    assert made.content[0].text and made.usage.output_tokens <= 8 and made._request_id.startswith("req_")
    turns = [{"role": "user", "content": [{"type": "text", "text": "Name a river.", **marked}]}, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "Nile"}]}, {"role": "user", "content": [
            {"type": "document", "title": "List", "source": {"type": "text", "media_type": "text/plain", "data": "Nile, Amazon"}}]}]
    assert client.messages.create(**_asked(messages=turns)).content
    assert client.messages.count_tokens(model=CHAT, messages=RIVER, system="Be brief.").input_tokens == made.usage.input_tokens + made.usage.cache_read_input_tokens


@case("anthropic")
def messages_streamed(url: str) -> None:
    client = _anthropic(url)
    with client.messages.stream(**_asked()) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().content[0].text == text
    kinds = [event.type for event in client.messages.create(**_asked(stream=True))]
    assert kinds[:2] == ["message_start", "content_block_start"] and kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@case("anthropic")
def messages_tools(url: str) -> None:
    client = _anthropic(url)
    for choice in ({"type": "auto"}, {"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}):
        made = client.messages.create(**_asked(TOOLS, tools=[{**TOOL, "type": "custom", "strict": True}], tool_choice=choice))
        assert made.stop_reason == "tool_use" and made.content[-1].input["city"] == "Paris"
    assert client.messages.create(**_asked(TOOLS, tools=[TOOL], tool_choice={"type": "none"}, max_tokens=4)).content[0].type == "text"
    for content in ("18 C", [{"type": "text", "text": "18 C"}, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}]):
        result = {"type": "tool_result", "tool_use_id": made.content[-1].id, "content": content, "is_error": False}
        told = [*ASKED, {"role": "assistant", "content": made.content}, {"role": "user", "content": [result]}]
        assert client.messages.create(**_asked(TOOLS if isinstance(content, str) else SEES, messages=told, tools=[TOOL], max_tokens=2)).content
    with client.messages.stream(**_asked(TOOLS, tools=[TOOL], tool_choice={"type": "any"})) as stream:
        assert any(event.type == "input_json" for event in stream)
        assert stream.get_final_message().content[0].input == {"city": "Paris"}


@case("anthropic")
def messages_parsed(url: str) -> None:
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    client, asked = _anthropic(url), _asked(TOOLS, messages=BOB)
    assert client.messages.parse(**asked, output_format=Person).parsed_output.age == 5
    form = {"format": {"type": "json_schema", "schema": PERSON}}
    assert json.loads(client.messages.create(**asked, output_config=form).content[0].text)["age"] == 5
    with client.messages.stream(**asked, output_format=Person) as stream:
        assert stream.get_final_message().parsed_output.name == "Bob"


@case("anthropic")
def messages_pictures(url: str) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": PICTURE}
    parts = [{"type": "image", "source": source}, {"type": "text", "text": SHAPES}]
    assert _anthropic(url).messages.create(**_asked(SEES, messages=[{"role": "user", "content": parts}], max_tokens=8)).content[0].text


@case("anthropic")
def messages_errors(url: str) -> None:
    import anthropic

    client = _anthropic(url)
    assert raised(anthropic.NotFoundError, lambda: client.messages.create(**_asked(model="nope"))).request_id.startswith("req_")
    for change, part in (({"messages": []}, "messages"), ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
                         ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"), ({"extra_body": {"temperature": -5}}, "temperature")):
        error = raised(anthropic.BadRequestError, lambda c=change: client.messages.create(**_asked(**c)))
        assert error.body["type"] == "error" and error.body["error"]["message"].startswith(part)
    raised(anthropic.NotFoundError, lambda: client.messages.batches.list())


@case("anthropic")
def messages_models(url: str) -> None:
    client = _anthropic(url)
    assert {m.id for m in client.models.list()} == {CHAT, TOOLS, SEES} and client.models.retrieve(CHAT).display_name == CHAT


@case("anthropic", recorded=False)
def messages_leave(url: str) -> None:
    import anthropic

    client = _anthropic(url)
    stream = client.messages.create(**_asked(TOOLS, messages=STORY, max_tokens=900, stream=True))
    next(stream)
    next(stream)
    next(stream)
    assert working(url)
    stream.close()
    comes_to_rest(url)
    raised(anthropic.APITimeoutError, lambda: client.with_options(timeout=0.2).messages.create(**_asked(TOOLS, messages=STORY, max_tokens=900)))
    comes_to_rest(url)
