"""Tools that a model may call, read from OpenAI's form; what is wrong with one is said with its path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from pyengine.errors import RequestError, shown
from pyengine.records import dataclass
from pyengine.text.grammar import check_schema

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NOTHING = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tool:
    """A function that may be called; `parameters` is the JSON schema of its arguments, an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(_NOTHING))
    strict: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Give the tool in OpenAI's form."""
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}}


def read_tools(tools: Any) -> list[Tool]:
    """Read a list of tools. Raises RequestError that names the field."""
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise RequestError(f"tools: a list of tools, not {type(tools).__name__}")
    found: dict[str, Tool] = {}
    for i, tool in enumerate(tools):
        read = _read_tool(tool, f"tools[{i}]")
        if read.name in found:
            raise RequestError(f"tools[{i}].function.name: {read.name!r} is the name of two tools; give each its own")
        found[read.name] = read
    return list(found.values())


def _read_tool(tool: Any, path: str) -> Tool:
    if not isinstance(tool, Mapping):
        raise RequestError(f"{path}: an object with a type and a function, not {type(tool).__name__}")
    if tool.get("type", "function") != "function":
        raise RequestError(f"{path}.type: only 'function' is there, not {shown(tool['type'])}")
    function = tool.get("function")
    if function is None:
        raise RequestError(f"{path}.function is missing")
    path += ".function"
    if not isinstance(function, Mapping):
        raise RequestError(f"{path}: an object with a name, not {type(function).__name__}")
    name, description, strict = (function.get(key) for key in ("name", "description", "strict"))
    if name is None:
        raise RequestError(f"{path}.name is missing")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"{path}.name: up to 64 letters, digits, '_', '-' and '.', not {shown(name)}")
    if not isinstance(description, (str, type(None))):
        raise RequestError(f"{path}.description: a text, not {type(description).__name__}")
    if not isinstance(strict, (bool, type(None))):
        raise RequestError(f"{path}.strict: true or false, not {shown(strict)}")
    return Tool(name, description or "", _read_parameters(function.get("parameters"), f"{path}.parameters"), bool(strict))


def _read_parameters(schema: Any, path: str) -> dict[str, Any]:
    if schema is None or schema == {}:
        return dict(_NOTHING)
    if not isinstance(schema, Mapping):
        raise RequestError(f"{path}: a JSON schema, which is an object, not {type(schema).__name__}")
    check_schema(schema, path)
    kind = schema.get("type", "object")
    if kind != "object":
        raise RequestError(f"{path}.type: arguments are an object, so the type is 'object', not {shown(kind)}")
    return {"type": "object", **schema}

