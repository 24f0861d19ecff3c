"""More cases of `clients.CASES`: frameworks over these interfaces, LangChain's and LiteLLM's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from clients import ASKED, BOB, case, CHAT, comes_to_rest, DATA_URL, PERSON, PICTURE, raised, RIVER, SEES, STORY, TOOLS, WEATHER, working

SHAPES = "what shapes are there?"


# -- LangChain -------------------------------------------------------------------------------------------------------------


def _weather_tool() -> Any:
    from langchain_core.tools import tool

    @tool
    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        return "18 C in " + city

    return get_weather


def _langchain(url: str, kind: str, model: str, n: int, seconds: float = 60) -> Any:
    if kind == "ollama":
        from langchain_ollama import ChatOllama

        return ChatOllama(base_url=url, model=model, temperature=0, num_predict=n, client_kwargs={"timeout": seconds})
    if kind == "anthropic":
        from langchain_anthropic import ChatAnthropic

        return ChatAnthropic(base_url=url, api_key="none", model=model, temperature=0, max_tokens=n, max_retries=0, timeout=seconds)
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=url + "/v1", api_key="none", model=model, temperature=0, max_tokens=n, max_retries=0, use_responses_api=kind == "responses",
                      timeout=seconds)


def _langchains(kind: str) -> dict[str, Callable[[str], None]]:
    from_tool: dict[str, Any] = {} if kind == "ollama" else {"tool_choice": "get_weather"}

    def says(url: str) -> None:
        model = _langchain(url, kind, CHAT, 16)
        assert model.invoke("Name a river.").usage_metadata["output_tokens"] <= 16 and len(list(model.stream("Name a river."))) > 2

    def calls(url: str) -> None:
        from langchain_core.messages import ToolMessage

        bound = _langchain(url, kind, TOOLS, 60).bind_tools([_weather_tool()], **from_tool)
        said = bound.invoke(ASKED)
        assert said.tool_calls[0]["args"] == {"city": "Paris"}
        whole = None
        for piece in bound.stream(ASKED):
            whole = piece if whole is None else whole + piece
        assert whole.tool_calls[0]["args"] == {"city": "Paris"}
        free = _langchain(url, kind, TOOLS, 16).bind_tools([_weather_tool()])
        assert free.invoke([*ASKED, said, ToolMessage("18 C", tool_call_id=said.tool_calls[0]["id"])]).usage_metadata["output_tokens"] <= 16

    def forms(url: str) -> None:
        for method in ("json_schema", "function_calling"):
            assert _langchain(url, kind, TOOLS, 60).with_structured_output(PERSON | {"title": "person"}, method=method).invoke(BOB)["age"] == 5

    def sees(url: str) -> None:
        parts = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "image", "base64": PICTURE, "mime_type": "image/png"}, {"type": "text", "text": SHAPES}]
        assert _langchain(url, kind, SEES, 16).invoke([{"role": "user", "content": parts}]).content

    def fails(url: str) -> None:
        error = raised(Exception, lambda: _langchain(url, kind, "nope", 4).invoke("Hello"))
        assert "no model" in str(error) and getattr(error, "status_code", 404) == 404 and not working(url)
        assert "city" in str(raised(Exception, lambda: _langchain(url, kind, TOOLS, 4).bind_tools([{"type": "function", "function": {
            "name": "f", "parameters": {"type": "object", "properties": {"city": {"type": "place"}}}}}]).invoke("Hello")))

    def leaves(url: str) -> None:
        long = _langchain(url, kind, TOOLS, 900)
        stream = long.stream(STORY)
        next(stream), next(stream)
        assert working(url)
        stream.close()
        comes_to_rest(url)

        async def cancelled() -> None:
            task = asyncio.ensure_future(long.ainvoke(STORY))
            while not await asyncio.to_thread(working, url):
                await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            pieces = long.astream(STORY)
            await pieces.__anext__()
            await pieces.aclose()

        asyncio.run(cancelled())
        comes_to_rest(url)
        raised(Exception, lambda: _langchain(url, kind, TOOLS, 900, 0.3).invoke(STORY))
        comes_to_rest(url)

    return {f"{kind}_{call.__name__}": call for call in (says, calls, forms, sees, fails, leaves)}


for _package, _kinds in (("langchain_openai", ("chat", "responses")), ("langchain_ollama", ("ollama",)), ("langchain_anthropic", ("anthropic",))):
    for _kind in _kinds:
        for _name, _call in _langchains(_kind).items():
            _call.__name__ = "langchain_" + _name
            case(_package, recorded=not _name.endswith("leaves"))(_call)


@case("langchain_openai")
def langchain_embeds(url: str) -> None:
    from langchain_openai import OpenAIEmbeddings

    made = OpenAIEmbeddings(base_url=url + "/v1", api_key="none", model=CHAT, check_embedding_ctx_length=False)
    assert len(made.embed_documents(["hello", "you"])) == 2 and made.embed_query("hello")


@case("langchain_ollama")
def langchain_ollama_embeds(url: str) -> None:
    from langchain_ollama import OllamaEmbeddings

    assert len(OllamaEmbeddings(base_url=url, model=CHAT).embed_documents(["hello", "you"])) == 2


# -- LiteLLM ---------------------------------------------------------------------------------------------------------------


@case("litellm")
def litellm_providers(url: str) -> None:
    import litellm

    ways = {"openai": url + "/v1", "hosted_vllm": url + "/v1", "ollama_chat": url, "ollama": url, "anthropic": url}
    for provider, base in ways.items():
        def ask(model: str = CHAT, *, base: str = base, provider: str = provider, **more: Any) -> Any:
            asked = {"messages": RIVER, "max_tokens": 8, "temperature": 0, "num_retries": 0, "api_key": "none", **more}
            return litellm.completion(model=f"{provider}/{model}", api_base=base, drop_params=True, **asked)

        assert ask().choices[0].message.content
        assert "".join(piece.choices[0].delta.content or "" for piece in ask(stream=True))
        called = ask(TOOLS, messages=ASKED, tools=[WEATHER], tool_choice="auto", max_tokens=60).choices[0].message.tool_calls
        assert json.loads(called[0].function.arguments) == {"city": "Paris"}, provider
        form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
        assert json.loads(ask(TOOLS, messages=BOB, response_format=form, max_tokens=60).choices[0].message.content)["age"] == 5, provider
        parts = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": SHAPES}]
        assert ask(SEES, messages=[{"role": "user", "content": parts}]).choices[0].message.content
        raised(litellm.NotFoundError, lambda ask=ask: ask("nope"))
        whole = litellm.stream_chunk_builder(list(ask(TOOLS, messages=ASKED, tools=[WEATHER], max_tokens=60, stream=True)))
        assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments) == {"city": "Paris"}, provider
    assert len(litellm.embedding(model=f"openai/{CHAT}", api_base=url + "/v1", api_key="none", input=["a", "b"]).data) == 2


@case("litellm", recorded=False)
def litellm_leaves(url: str) -> None:
    import litellm

    for provider, base in (("openai", url + "/v1"), ("ollama_chat", url), ("anthropic", url)):
        asked = {"model": f"{provider}/{TOOLS}", "api_base": base, "api_key": "none", "messages": STORY, "max_tokens": 900, "num_retries": 0}

        async def cancelled(asked: dict[str, Any] = asked) -> None:
            stream = await litellm.acompletion(**asked, stream=True)
            await stream.__anext__()
            await stream.aclose()
            await asyncio.to_thread(comes_to_rest, url)
            task = asyncio.ensure_future(litellm.acompletion(**asked))
            while not await asyncio.to_thread(working, url):
                await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(cancelled())
        comes_to_rest(url)
        raised((litellm.Timeout, litellm.APIConnectionError), lambda asked=asked: litellm.completion(**asked, timeout=0.3))
        comes_to_rest(url)
