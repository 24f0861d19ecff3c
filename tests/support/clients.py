"""Calls of real client packages against a server of this project: what must work with them, unmodified.

`CASES` has functions by package. Each takes the server's address, and raises where the client does not get what it needs: OpenAI's and Anthropic's
clients are told to validate every answer against their own types. `record_clients.py` writes down what they send, `test_clients.py`
sends that again. The server has the three models below.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.request import urlopen

CHAT, TOOLS, SEES = "smollm2-135m-q4_1", "qwen2.5-coder-0.5b-q4_k_m", "demo-q8_0"
Case = Callable[[str], None]
CASES: dict[str, dict[str, Case]] = {}
UNRECORDED: set[str] = set()             # cases that leave an answer before its end

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"], "additionalProperties": False}
FUNCTION = {"name": "get_weather", "description": "Get the weather of a city.", "parameters": PARAMETERS}
WEATHER = {"type": "function", "function": FUNCTION}
BY_NAME = {"type": "function", "function": {"name": "get_weather"}}
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
          "required": ["name", "age"], "additionalProperties": False}
RIVER = [{"role": "user", "content": "Name a river."}]
ASKED = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]
BOB = [{"role": "user", "content": "Bob is 5 years old."}]
STORY = [{"role": "user", "content": "Write a long story about a river."}]


def case(package: str, recorded: bool = True) -> Callable[[Case], Case]:
    """Add a case of a package."""
    def add(call: Case) -> Case:
        CASES.setdefault(package, {})[call.__name__] = call
        if not recorded:
            UNRECORDED.add(call.__name__)
        return call

    return add


def square(size: int = 56) -> bytes:
    """A PNG of a red square on white."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    inside = range(size // 4, 3 * size // 4)
    rows = b"".join(b"\0" + b"".join(b"\xd0\x10\x10" if x in inside and y in inside else b"\xff\xff\xff" for x in range(size)) for y in range(size))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", size, size, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


PICTURE = base64.b64encode(square()).decode()
DATA_URL = "data:image/png;base64," + PICTURE


def working(url: str) -> bool:
    """Whether the server works on a request."""
    with urlopen(url + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return any(line.startswith("pyengine_requests_running{") and not line.endswith(" 0.0") for line in lines)


def comes_to_rest(url: str, seconds: float = 3.0) -> None:
    """Wait until the server works on nothing, which a request that is left alone would not let it do for long."""
    end = time.monotonic() + seconds
    while working(url):
        assert time.monotonic() < end, "the server still works for a client that has left"
        time.sleep(0.05)


def raised(kind: type[BaseException] | tuple[type[BaseException], ...], call: Callable[[], Any]) -> Any:
    """The error of a call, which must be of this kind."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind} was raised")


def _openai(url: str, **more: Any) -> Any:
    import openai

    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, **{"_strict_response_validation": True, **more})


def _person() -> Any:
    import pydantic

    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=10)
        age: int = pydantic.Field(ge=0, le=150)

    return Person


# -- openai: chat completions ----------------------------------------------------------------------------------------------


@case("openai")
def chat(url: str) -> None:
    made = _openai(url).chat.completions.create(model=CHAT, messages=[{"role": "developer", "content": "Be brief."}, *RIVER], max_completion_tokens=8, temperature=0,
                                                user="me", metadata={"a": "b"}, store=False, service_tier="auto", reasoning_effort="none", parallel_tool_calls=True)
    assert made.choices[0].message.content and made.usage.completion_tokens <= 8 and made._request_id.startswith("req_")


@case("openai")
def chat_of_parts(url: str) -> None:
    part = {"type": "text", "text": "Name a river."}
    turns = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "name": "bob", "content": [part, part]},
             {"role": "assistant", "content": [{"type": "text", "text": "Nile"}], "refusal": None}, {"role": "user", "content": "Another?"}]
    assert _openai(url).chat.completions.create(model=CHAT, messages=turns, max_tokens=4).choices[0].message.content


@case("openai")
def chat_streamed(url: str) -> None:
    got = list(_openai(url).chat.completions.create(model=CHAT, messages=RIVER, max_tokens=6, n=2, seed=1, stream=True,
                                                    stream_options={"include_usage": True, "include_obfuscation": False}))
    assert {c.choices[0].index for c in got if c.choices} == {0, 1} and got[-1].usage.completion_tokens == 12


@case("openai")
def chat_choices_and_logprobs(url: str) -> None:
    made = _openai(url).chat.completions.create(model=CHAT, messages=RIVER, n=3, max_tokens=4, logprobs=True, top_logprobs=3, seed=3, stop=["\n"], top_p=0.9,
                                                logit_bias={"5": -100}, presence_penalty=0.1, frequency_penalty=0.1)
    assert len(made.choices) == 3 and len(made.choices[0].logprobs.content[0].top_logprobs) == 3


@case("openai")
def chat_stream_helper(url: str) -> None:
    with _openai(url).chat.completions.stream(model=CHAT, messages=RIVER, max_tokens=60, stop=["."], temperature=0, logprobs=True) as stream:
        kinds = {event.type for event in stream}
        said = stream.get_final_completion().choices[0].message.content
    assert {"chunk", "content.delta", "logprobs.content.delta"} <= kinds and said


@case("openai")
def chat_tools(url: str) -> None:
    client = _openai(url)

    def choice(**more: Any) -> Any:
        return client.chat.completions.create(model=TOOLS, messages=ASKED, tools=[WEATHER], temperature=0, max_tokens=60, **more).choices[0]

    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [BY_NAME]}}
    for asked in ("auto", "required", BY_NAME, allowed):
        made = choice(tool_choice=asked)
        assert made.finish_reason == "tool_calls" and json.loads(made.message.tool_calls[0].function.arguments)["city"], asked
    assert len(choice(tool_choice="required", parallel_tool_calls=False).message.tool_calls) == 1
    assert choice(tool_choice="none").message.tool_calls is None


@case("openai")
def chat_tools_streamed(url: str) -> None:
    strict = {"type": "function", "function": {**FUNCTION, "strict": True}}
    with _openai(url).chat.completions.stream(model=TOOLS, messages=ASKED, tools=[strict], tool_choice="required", temperature=0, max_tokens=60) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.delta" in kinds and call.function.parsed_arguments["city"] == "Paris"


@case("openai")
def chat_tools_in_parallel_and_back(url: str) -> None:
    client, clock = _openai(url), {"type": "function", "function": {"name": "get_time", "parameters": PARAMETERS}}
    asked = [{"role": "user", "content": "Call get_weather for Paris and get_time for Rome, both."}]
    said = client.chat.completions.create(model=TOOLS, messages=asked, tools=[WEATHER, clock], tool_choice="required", temperature=0, max_tokens=80).choices[0].message
    assert {c.function.name for c in said.tool_calls} == {"get_weather", "get_time"}
    results = [{"role": "tool", "tool_call_id": c.id, "content": [{"type": "text", "text": "18 C"}]} for c in said.tool_calls]
    for turn in (said, said.model_dump(), said.model_dump(exclude_none=True)):
        assert client.chat.completions.create(model=TOOLS, messages=[*asked, turn, *results], tools=[WEATHER, clock], max_tokens=2, temperature=0).choices


@case("openai")
def chat_parsed(url: str) -> None:
    client, person = _openai(url), _person()
    for parse in (client.chat.completions.parse, client.beta.chat.completions.parse):
        assert parse(model=TOOLS, messages=BOB, response_format=person, temperature=0, max_tokens=60).choices[0].message.parsed.age == 5
    with client.chat.completions.stream(model=TOOLS, messages=BOB, response_format=person, temperature=0, max_tokens=60) as stream:
        assert stream.get_final_completion().choices[0].message.parsed.name == "Bob"
    whole = client.chat.completions.create(model=TOOLS, messages=BOB, response_format={"type": "json_object"}, temperature=0, max_tokens=60)
    assert isinstance(json.loads(whole.choices[0].message.content), dict)


@case("openai")
def chat_tool_of_a_class(url: str) -> None:
    import openai
    import pydantic

    class GetWeather(pydantic.BaseModel):
        """Get the weather of a city."""

        city: str = pydantic.Field(max_length=20)

    client, tool = _openai(url), openai.pydantic_function_tool(GetWeather)
    made = client.chat.completions.parse(model=TOOLS, messages=ASKED, tools=[tool], tool_choice="required", temperature=0, max_tokens=60)
    assert made.choices[0].message.tool_calls[0].function.parsed_arguments.city == "Paris"
    made = client.responses.parse(model=TOOLS, input=ASKED, tools=[tool], tool_choice="required", temperature=0, max_output_tokens=60)
    assert made.output[0].parsed_arguments.city == "Paris"


@case("openai")
def chat_that_is_cut(url: str) -> None:
    import openai

    raised(openai.LengthFinishReasonError,
           lambda: _openai(url).chat.completions.parse(model=TOOLS, messages=BOB, response_format=_person(), temperature=0, max_tokens=3))


@case("openai")
def pictures(url: str) -> None:
    import openai

    client, text = _openai(url), "what shapes are there?"
    parts = [{"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}}, {"type": "text", "text": text}]
    made = client.chat.completions.create(model=SEES, messages=[{"role": "user", "content": parts}], max_tokens=10, temperature=0)
    assert made.usage.prompt_tokens_details.image_tokens > 0
    parts = [{"type": "input_image", "image_url": DATA_URL, "detail": "auto"}, {"type": "input_text", "text": text}]
    again = client.responses.create(model=SEES, input=[{"role": "user", "content": parts}], max_output_tokens=16, temperature=0)
    assert again.output_text == made.choices[0].message.content
    for model, address in ((SEES, "https://example.com/a.png"), (CHAT, DATA_URL)):
        turns = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}]
        raised(openai.BadRequestError, lambda m=model, t=turns: client.chat.completions.create(model=m, messages=t, max_tokens=1))


# -- openai: the others ----------------------------------------------------------------------------------------------------


@case("openai")
def completions(url: str) -> None:
    client = _openai(url, _strict_response_validation=False)             # an echo's first token has no probability, for OpenAI too
    made = client.completions.create(model=TOOLS, prompt="def f(", max_tokens=4, temperature=0, logprobs=2, n=2, echo=True)
    assert made.choices[1].text.startswith("def f(") and made.choices[0].logprobs.token_logprobs[0] is None
    assert "".join(c.choices[0].text for c in client.completions.create(model=TOOLS, prompt="def f(", max_tokens=4, stream=True))
    assert client.completions.create(model=TOOLS, prompt="def f(", suffix="return 1", max_tokens=4).choices[0].text


@case("openai")
def responses(url: str) -> None:
    import openai

    client = _openai(url)
    first = client.responses.create(model=CHAT, input="Name a river.", instructions="Be brief.", max_output_tokens=16, temperature=0, metadata={"a": "b"},
                                    text={"verbosity": "low"}, truncation="auto", max_tool_calls=3, prompt_cache_key="k", safety_identifier="s")
    assert first.output_text and first.usage.output_tokens <= 16
    assert client.responses.create(model=CHAT, input=[{"role": "user", "content": "Another?"}], previous_response_id=first.id, max_output_tokens=16).output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert list(client.responses.input_items.list(first.id))[0].content[0].text == "Name a river."
    assert client.responses.input_tokens.count(model=CHAT, input="Name a river.", instructions="Be brief.").input_tokens == first.usage.input_tokens
    referred = [{"role": "user", "content": "Name a river."}, {"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "Another?"}]
    assert client.responses.create(model=CHAT, input=referred, max_output_tokens=16, store=False).output_text
    raised(openai.BadRequestError, lambda: client.responses.cancel(first.id))
    client.responses.delete(first.id)
    raised(openai.NotFoundError, lambda: client.responses.retrieve(first.id))


@case("openai")
def responses_streamed(url: str) -> None:
    client, scored = _openai(url), {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    with client.responses.stream(model=CHAT, input="Name a river.", max_output_tokens=40, temperature=0) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    got = list(client.responses.create(model=CHAT, input="Name a river.", max_output_tokens=16, temperature=0, stream=True, **scored))
    assert sum(len(e.logprobs) for e in got if e.type == "response.output_text.delta") == got[-1].response.usage.output_tokens


@case("openai")
def responses_tools(url: str) -> None:
    client, tool = _openai(url), {"type": "function", "strict": True, **FUNCTION}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
    for choice in ("auto", {"type": "function", "name": "get_weather"}, allowed):
        made = client.responses.create(model=TOOLS, input=ASKED, tools=[tool], tool_choice=choice, temperature=0, max_output_tokens=60)
        assert [item.type for item in made.output] == ["function_call"]
    call = made.output[0]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "18 C"}
    assert client.responses.create(model=TOOLS, previous_response_id=made.id, input=[result], tools=[tool], max_output_tokens=16).output
    told = [*ASKED, *made.output, {**result, "output": [{"type": "input_text", "text": "18 C"}]}]
    assert client.responses.create(model=TOOLS, input=told, tools=[tool], max_output_tokens=16, store=False, include=["reasoning.encrypted_content"]).output
    with client.responses.stream(model=TOOLS, input=ASKED, tools=[tool], tool_choice="required", temperature=0, max_output_tokens=60) as stream:
        assert any(event.type == "response.function_call_arguments.delta" for event in stream)
        assert stream.get_final_response().output[0].parsed_arguments == {"city": "Paris"}


@case("openai")
def responses_parsed(url: str) -> None:
    client, person = _openai(url), _person()
    made = client.responses.parse(model=TOOLS, input="Bob is 5 years old.", text_format=person, temperature=0, max_output_tokens=60)
    assert made.output_parsed.age == 5
    with client.responses.stream(model=TOOLS, input="Bob is 5 years old.", text_format=person, temperature=0, max_output_tokens=60) as stream:
        assert stream.get_final_response().output_parsed == made.output_parsed


@case("openai")
def embeddings(url: str) -> None:
    client = _openai(url, _strict_response_validation=False)             # the client's own base64 is no list of numbers before it decodes it
    coded, plain = client.embeddings.create(model=CHAT, input="hello"), client.embeddings.create(model=CHAT, input=["hello", "you"], encoding_format="float")
    assert coded.data[0].embedding == plain.data[0].embedding and len(plain.data) == 2
    assert len(client.embeddings.create(model=CHAT, input=[[1, 2, 3], [4]], dimensions=64).data[1].embedding) == 64


@case("openai")
def models(url: str) -> None:
    client = _openai(url)
    assert {m.id for m in client.models.list()} == {CHAT, TOOLS, SEES} and client.models.retrieve(CHAT).id == CHAT


@case("openai")
def errors(url: str) -> None:
    import openai

    client, form = _openai(url), {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}
    for change, kind, field in (({"model": "nope"}, openai.NotFoundError, None), ({"messages": []}, openai.BadRequestError, "messages"),
                                ({"temperature": "x"}, openai.BadRequestError, "temperature"), ({"n": 0}, openai.BadRequestError, "n"),
                                ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
                                ({"reasoning_effort": "high"}, openai.BadRequestError, "reasoning_effort"),
                                ({"response_format": form}, openai.BadRequestError, "response_format.json_schema.schema.type"),
                                ({"messages": [{"role": "alien", "content": "x"}]}, openai.BadRequestError, "messages[0].role")):
        error = raised(kind, lambda c=change: client.chat.completions.create(**{"model": CHAT, "messages": RIVER, "max_tokens": 1, **c}))
        assert error.param == field and error.request_id.startswith("req_")
    long = [{"role": "user", "content": "a " * 2500}]
    assert raised(openai.BadRequestError, lambda: client.chat.completions.create(model=CHAT, messages=long)).code == "context_length_exceeded"
    raised(openai.NotFoundError, lambda: client.moderations.create(input="x"))


@case("openai", recorded=False)
def cancelled(url: str) -> None:
    import openai

    client = _openai(url)
    for begin in (lambda: client.chat.completions.create(model=TOOLS, messages=STORY, stream=True),
                  lambda: client.responses.create(model=TOOLS, input=STORY, stream=True)):
        stream = begin()
        for _, _ in zip(stream, range(5), strict=False):
            pass
        assert working(url)
        stream.close()
        comes_to_rest(url)
    raised(openai.APITimeoutError, lambda: client.with_options(timeout=0.2).chat.completions.create(model=TOOLS, messages=STORY))
    comes_to_rest(url)
    assert client.chat.completions.create(model=CHAT, messages=RIVER, max_tokens=2).choices


@case("openai", recorded=False)
def asynchronous(url: str) -> None:
    import openai

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, _strict_response_validation=True) as client:
            asked = {"messages": RIVER, "max_tokens": 8, "temperature": 0}
            one, two = await asyncio.gather(*(client.chat.completions.create(model=CHAT, **asked) for _ in range(2)))
            assert one.choices[0].message.content == two.choices[0].message.content
            async with client.responses.stream(model=CHAT, input="Name a river.", max_output_tokens=16) as stream:
                assert [event.type async for event in stream][0] == "response.created"
            task = asyncio.create_task(client.chat.completions.create(model=TOOLS, messages=STORY))
            await asyncio.sleep(0.5)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert {m.id async for m in client.models.list()} == {CHAT, TOOLS, SEES}

    asyncio.run(main())
    comes_to_rest(url)
