"""What clients need of answers, field by field: tables in a small notation, and what holds an answer against them.

A table is a type, None for null, a text that must be just that, a set of such texts, a list of one table for all items, a dict of tables by field (others may be
there; a name that ends in "?" may be missing), or several tables in `OneOf`. They are written from the types of the client packages: what these declare as
required, and what their code reads.
"""

from __future__ import annotations

from typing import Any


class OneOf:
    """One of several tables."""

    def __init__(self, *tables: Any):
        self.tables = tables


def faults(table: Any, value: Any, at: str = "answer") -> list[str]:
    """What a value lacks of a table, each with its place."""
    if isinstance(table, OneOf):
        return min((faults(t, value, at) for t in table.tables), key=len)
    if table is None:
        return [] if value is None else [f"{at}: {value!r} is not null"]
    if isinstance(table, dict):
        if not isinstance(value, dict):
            return [f"{at}: {value!r} is no object"]
        missing = [f"{at}.{name} is missing" for name in table if not name.endswith("?") and name not in value]
        return missing + [f for name, t in table.items() if name.rstrip("?") in value for f in faults(t, value[name.rstrip("?")], f"{at}.{name.rstrip('?')}")]
    if isinstance(table, list):
        return [f for i, item in enumerate(value) for f in faults(table[0], item, f"{at}[{i}]")] if isinstance(value, list) else [f"{at}: {value!r} is no list"]
    if isinstance(table, (str, set)):
        return [] if value in ({table} if isinstance(table, str) else table) else [f"{at}: {value!r} is not {table!r}"]
    kinds = (int, float) if table is float else table
    return [] if isinstance(value, kinds) and (table is bool or not isinstance(value, bool)) else [f"{at}: {value!r} is no {table.__name__}"]


def maybe(table: Any) -> OneOf:
    """Null, or that."""
    return OneOf(None, table)


# -- OpenAI: openai.types.chat, .completion, .responses, .create_embedding_response, .model ---------------------------------

SCORE = {"token": str, "logprob": float, "bytes": [int], "top_logprobs": [{"token": str, "logprob": float, "bytes": [int]}]}
USAGE = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int, "prompt_tokens_details": {"cached_tokens": int},
         "completion_tokens_details": {"reasoning_tokens": int}}
FINISHES = {"stop", "length", "tool_calls"}
CALL = {"id": str, "type": "function", "function": {"name": str, "arguments": str}}
SCORES = maybe({"content": [SCORE]})
COMPLETION = {"id": str, "object": "chat.completion", "created": int, "model": str, "usage": USAGE, "choices": [
    {"index": int, "finish_reason": FINISHES, "logprobs": SCORES,
     "message": {"role": "assistant", "content": maybe(str), "refusal": None, "tool_calls?": [CALL]}}]}
CHUNK = {"id": str, "object": "chat.completion.chunk", "created": int, "model": str, "usage?": USAGE, "choices": [
    {"index": int, "finish_reason": maybe(FINISHES), "logprobs": SCORES, "delta": {"role?": "assistant", "content?": str, "tool_calls?": [
        {"index": int, "id?": str, "type?": "function", "function": {"name?": str, "arguments": str}}]}}]}
TEXT = {"id": str, "object": "text_completion", "created": int, "model": str, "usage?": USAGE, "choices": [
    {"index": int, "text": str, "finish_reason": maybe({"stop", "length"}), "logprobs": maybe({
        "tokens": [str], "text_offset": [int], "token_logprobs": [maybe(float)], "top_logprobs": [maybe(dict)]})}]}
PART = {"type": "output_text", "text": str, "annotations": list, "logprobs": [SCORE]}
ITEM = OneOf({"type": "message", "id": str, "role": "assistant", "status": str, "content": [PART]},
            {"type": "function_call", "id": str, "call_id": str, "name": str, "arguments": str, "status": str})
RESPONSE = {"id": str, "object": "response", "created_at": int, "model": str, "status": {"completed", "incomplete", "in_progress"}, "error": None,
            "incomplete_details": maybe({"reason": "max_output_tokens"}), "instructions": maybe(str), "metadata": dict, "output": [ITEM],
            "parallel_tool_calls": bool, "temperature": maybe(float), "top_p": maybe(float), "tool_choice": OneOf(str, dict), "tools": [{"type": "function"}],
            "usage": maybe({"input_tokens": int, "input_tokens_details": {"cached_tokens": int, "cache_write_tokens": int}, "output_tokens": int,
                            "output_tokens_details": {"reasoning_tokens": int}, "total_tokens": int})}
_AT = {"item_id": str, "output_index": int}
RESPONSE_EVENTS = {name: {"type": f"response.{name}", "sequence_number": int, **table} for name, table in {
    "created": {"response": RESPONSE}, "in_progress": {"response": RESPONSE}, "completed": {"response": RESPONSE}, "incomplete": {"response": RESPONSE},
    "output_item.added": {"output_index": int, "item": ITEM}, "output_item.done": {"output_index": int, "item": ITEM},
    "content_part.added": {**_AT, "content_index": int, "part": PART}, "content_part.done": {**_AT, "content_index": int, "part": PART},
    "output_text.delta": {**_AT, "content_index": int, "delta": str, "logprobs": [SCORE]},
    "output_text.done": {**_AT, "content_index": int, "text": str, "logprobs": [SCORE]},
    "function_call_arguments.delta": {**_AT, "delta": str}, "function_call_arguments.done": {**_AT, "arguments": str, "name": str}}.items()}
VECTORS = {"object": "list", "model": str, "usage": {"prompt_tokens": int, "total_tokens": int},
           "data": [{"object": "embedding", "index": int, "embedding": OneOf(str, [float])}]}
MODEL = {"id": str, "object": "model", "created": int, "owned_by": str}
OPENAI_ERROR = {"error": {"message": str, "type": str, "param": maybe(str), "code": maybe(str)}}

# -- Ollama: ollama._types --------------------------------------------------------------------------------------------------

OLLAMA_SCORE = {"token": str, "logprob": float, "top_logprobs": [{"token": str, "logprob": float}]}
_LINE = {"model": str, "created_at": str, "done": bool, "logprobs?": [OLLAMA_SCORE]}
_LAST = {"done_reason?": {"stop", "length", "load"}, "total_duration?": int, "load_duration?": int, "prompt_eval_count?": int, "prompt_eval_duration?": int,
         "eval_count?": int, "eval_duration?": int}
OLLAMA_CHAT = {**_LINE, **_LAST, "message": {"role": "assistant", "content": str, "tool_calls?": [{"function": {"name": str, "arguments": dict}}]}}
OLLAMA_TEXT = {**_LINE, **_LAST, "response": str}
OLLAMA_ENDS = {name.rstrip("?"): table for name, table in _LAST.items()}
DETAILS = {"parent_model": str, "format": "gguf", "family": str, "families": [str], "parameter_size": str, "quantization_level": str}
_LISTED = {"name": str, "model": str, "modified_at": str, "size": int, "digest": str, "details": DETAILS}
OLLAMA_TAGS = {"models": [_LISTED]}
OLLAMA_PS = {"models": [{**_LISTED, "expires_at": str, "size_vram": int, "context_length": int}]}
OLLAMA_SHOW = {"details": DETAILS, "model_info": dict, "template": str, "capabilities": [str], "modified_at": str, "license": str}
OLLAMA_VECTORS = {"model": str, "embeddings": [[float]], "total_duration": int, "load_duration": int, "prompt_eval_count": int}
OLLAMA_ERROR = {"error": str}

# -- Anthropic: anthropic.types ---------------------------------------------------------------------------------------------

BLOCK = OneOf({"type": "text", "text": str}, {"type": "tool_use", "id": str, "name": str, "input": dict})
_TOKENS = {"input_tokens": int, "output_tokens": int, "cache_read_input_tokens": int, "cache_creation_input_tokens": int}
_STOP = maybe({"end_turn", "max_tokens", "stop_sequence", "tool_use"})
MESSAGE = {"id": str, "type": "message", "role": "assistant", "model": str, "content": [BLOCK], "stop_reason": _STOP, "stop_sequence": maybe(str), "usage": _TOKENS}
MESSAGE_EVENTS = {name: {"type": name, **table} for name, table in {
    "message_start": {"message": MESSAGE}, "content_block_start": {"index": int, "content_block": BLOCK}, "content_block_stop": {"index": int},
    "content_block_delta": {"index": int, "delta": OneOf({"type": "text_delta", "text": str}, {"type": "input_json_delta", "partial_json": str})},
    "message_delta": {"delta": {"stop_reason": _STOP, "stop_sequence": maybe(str)}, "usage": _TOKENS}, "message_stop": {}}.items()}
ANTHROPIC_MODEL = {"id": str, "type": "model", "display_name": str, "created_at": str, "lifecycle": "active"}
ANTHROPIC_ERROR = {"type": "error", "error": {"type": str, "message": str}}
