"""Files that a conversation is given: tools, as Python functions or as a JSON list, and the JSON schema of its answers."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TYPE_CHECKING

from pyengine.errors import placed, RequestError

if TYPE_CHECKING:
    from pyengine.chat.reply.deltas import ToolCall
    from pyengine.engine.tools import Toolbox

MODULE = "pyengine_tools"            # the name under which a file of functions is imported


@dataclass(frozen=True)
class Tools:
    """Tools of one file. `functions` run here; without them, a person says what a call gives."""

    path: Path
    schemas: list[dict[str, Any]]
    functions: Toolbox | None = None

    @property
    def names(self) -> list[str]:
        """Names of the tools."""
        return [schema["function"]["name"] for schema in self.schemas]

    def content(self, call: ToolCall, ask: Callable[[], str]) -> Any:
        """Return what a call gives, as the content of its message; `ask` asks the person at the terminal. Raises what `ask` raises."""
        if self.functions is not None:
            return self.functions.content(call)
        if call.name not in self.names:
            return f"error: there is no tool {call.name}; there are {', '.join(self.names)}"
        return ask()


def read_tools(path: Path) -> Tools:
    """Read a file of tools: the public functions of a Python file, which is run, or OpenAI's list in a JSON file. Raises: RequestError."""
    if path.suffix.lower() == ".py":
        return _functions(path)
    if path.suffix.lower() != ".json":
        raise RequestError(f"/tools {path}: tools are the functions of a Python file (.py), or a list in a JSON file (.json)")
    found = _json(path, "/tools")
    if isinstance(found, Mapping) and "tools" in found:
        found = found["tools"]
    if not isinstance(found, list) or not found:
        raise RequestError(f'/tools {path}: a list of tools is expected: [{{"type": "function", "function": {{"name": .., "parameters": ..}}}}]')
    schemas = [_tool(tool, f"/tools {path}: [{i}]") for i, tool in enumerate(found)]
    names = [schema["function"]["name"] for schema in schemas]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RequestError(f"/tools {path}: [{i}].function.name: there are two tools of the name {name}")
    return Tools(path, schemas)


def read_format(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON schema. Raises: RequestError with the path of the fault."""
    schema = _json(path, "/format")
    if not isinstance(schema, dict):
        raise RequestError(f"/format {path}: a schema is an object, not {_named(schema)}")
    check_schema(schema, f"/format {path}")
    return schema


def check_schema(schema: Any, where: str) -> None:
    """Refuse what is no JSON schema. Raises: RequestError with the path of the fault, after `where`."""
    from jsonschema import Draft202012Validator              # takes 60 ms to import
    from jsonschema.exceptions import best_match

    fault = best_match(Draft202012Validator(Draft202012Validator.META_SCHEMA).iter_errors(schema))
    if fault is not None:
        raise RequestError(f"{where}: {placed(fault)}")


def _tool(tool: Any, at: str) -> dict[str, Any]:
    """Return one tool in OpenAI's form; a function without its wrapping is taken too. Raises: RequestError with the field's path."""
    if not isinstance(tool, dict):
        raise RequestError(f"{at}: a tool is an object, not {_named(tool)}")
    if tool.get("type", "function") != "function":
        raise RequestError(f"{at}.type: only function is known, not {tool['type']!r}")
    wrapped = "function" in tool
    function, at = (tool["function"], f"{at}.function") if wrapped else (tool, at)
    if not isinstance(function, dict):
        raise RequestError(f"{at}: a function is an object, not {_named(function)}")
    name, parameters = function.get("name"), function.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(name, str) or not name:
        raise RequestError(f"{at}.name: each tool needs a name, a text")
    if not isinstance(function.get("description", ""), str):
        raise RequestError(f"{at}.description: a text, not {_named(function['description'])}")
    if not isinstance(parameters, dict):
        raise RequestError(f"{at}.parameters: a JSON schema is an object, not {_named(parameters)}")
    check_schema(parameters, f"{at}.parameters")
    plain = {key: value for key, value in function.items() if key != "type"}
    return {"type": "function", "function": {"description": "", **plain, "parameters": parameters}}


def _functions(path: Path) -> Tools:
    from pyengine.engine.tools import Toolbox

    module = _run(path)
    public = [f for name, f in vars(module).items() if not name.startswith("_") and inspect.isfunction(f) and f.__module__ == MODULE]
    if not public:
        raise RequestError(f"/tools {path}: it defines no public functions")
    try:
        functions = Toolbox(public)
    except RequestError as error:
        raise RequestError(f"/tools {path}: {error}; a name that begins with _ keeps a function out") from None
    return Tools(path, functions.schemas, functions)


def _run(path: Path) -> ModuleType:
    """Run a file as a module. Raises: RequestError with the line, for whatever it raises."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module, before, folder = importlib.util.module_from_spec(spec), sys.modules.get(MODULE), str(path.resolve().parent)
    sys.modules[MODULE] = module                             # where hints and dataclasses look for its names
    sys.path.insert(0, folder)                               # what it imports may lie beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if before is not None:
            sys.modules[MODULE] = before
        if isinstance(error, OSError) and error.filename == str(path):
            raise RequestError(f"/tools {path}: {error.strerror}") from None
        raise RequestError(f"/tools {path}: {_line(error, path)}{type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(folder)
    return module


def _line(error: BaseException, path: Path) -> str:
    """Return the last line of the file that an error went through."""
    number, trace = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            number = trace.tb_lineno
        trace = trace.tb_next
    return f"line {number}: " if number else ""


def _json(path: Path, command: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{command} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:            # no UTF-8, no JSON
        raise RequestError(f"{command} {path}: it is no JSON: {error}") from None


def _named(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
