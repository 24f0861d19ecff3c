"""JSON schemas as rules of grammars, for formats that write arguments one by one or in a notation of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.chat.reply.calls import json_rule
from pyengine.chat.reply.tools import Tool
from pyengine.errors import RequestError

# Keywords by which a whole object is judged: formats that write arguments one by one cannot hold them.
_OF_OBJECTS = ("allOf", "anyOf", "oneOf", "not", "if", "$ref", "dependentRequired", "dependentSchemas", "minProperties", "maxProperties",
               "propertyNames", "unevaluatedProperties", "enum", "const")


def properties_of(schema: Mapping[str, Any], where: str) -> list[tuple[str, Any, bool]]:
    """List an object's properties: name, schema, and whether it must be there. Raises RequestError for what cannot be held."""
    for keyword in _OF_OBJECTS:
        if keyword in schema:
            raise RequestError(f"{where}.{keyword}: this model's format writes arguments one by one, so that it cannot be enforced; leave it out")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    names = [*properties, *(name for name in required if name not in properties)]
    return [(name, properties.get(name, {}), name in required) for name in names]


def arguments_of(tool: Tool) -> list[tuple[str, Any, bool]]:
    """List a tool's arguments: name, schema, and whether it must be given."""
    return properties_of(tool.parameters, f"tools: {tool.name}.parameters")


def json_value(schema: Any, tool: Tool) -> str:
    """Return a grammar's fragment for a value as JSON; what the tool's schema defines by name, it may refer to."""
    if not isinstance(schema, Mapping):
        schema = {} if schema else {"not": {}}
    shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return json_rule({**shared, **schema})


def ordered(rule: str, items: Sequence[tuple[str, bool]], separator: str) -> list[str]:
    """Return rules for items in their order, separated, of which some must be there: `<rule>0` is all of them.

    `<rule>N` is what may follow from item N on where none was written yet, `<rule>N_m` where one was.
    """
    lines = []
    for n, (item, needed) in enumerate(items):
        after = f"{rule}{n + 1}_m"
        lines.append(f"{rule}{n}: {item} {after}{'' if needed else f' | {rule}{n + 1}'}")
        lines.append(f"{rule}{n}_m: {json.dumps(separator)} {item} {after}{'' if needed else f' | {after}'}")
    return [*lines, f'{rule}{len(items)}: ""', f'{rule}{len(items)}_m: ""']


def is_text(schema: Any) -> bool:
    """Say whether values of a schema are texts and nothing else."""
    if not isinstance(schema, Mapping):
        return False
    if "type" in schema:
        return schema["type"] in ("string", ["string"])
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else []
    return bool(values) and all(isinstance(value, str) for value in values)


def text_rules(rule: str, schema: Mapping[str, Any], without: str, closing: str) -> list[str]:
    """Return rules for texts of a schema that stand unquoted, with the fragment that closes them: they must not hold `without`.

    A literal that closes is part of the texts' terminal, since nothing else would say where a text ends.
    """
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    if values is not None:
        return [f"{rule}: ({' | '.join(json.dumps(value, ensure_ascii=False) for value in values if isinstance(value, str))}) {closing}"]
    parts = ["/(?s:.*)/", f"~/(?s:.*){regex(without)}(?s:.*)/"]
    if "minLength" in schema or "maxLength" in schema:
        parts.append(f"/(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})/")
    if "pattern" in schema:
        parts.append(f"/{_anchored(schema['pattern'])}/")
    terminal = rule.upper()
    inside = closing if closing.startswith('"') else ""
    return [f"{rule}: {terminal} {'' if inside else closing}", f"{terminal}: ({' & '.join(parts)}) {inside}"]


def _anchored(pattern: str) -> str:
    """Return a schema's pattern, which is searched for, as one of whole texts."""
    before, after = "" if pattern.startswith("^") else "(?s:.*)", "(?s:.*)"
    body = pattern.removeprefix("^")
    if body.endswith("$") and not body.endswith("\\$"):
        body, after = body[:-1], ""
    return f"{before}(?:{body}){after}".replace("/", "\\/")


def regex(text: str) -> str:
    """Return a pattern of this text, for a grammar."""
    return "".join(letter if letter.isalnum() or letter in "_<> \"" else f"\\{letter}" for letter in text)


class Notation:
    """Rules for values of a tool's schema in a notation like JSON's, but with other quotes around texts and bare keys. `lines` are the rules."""

    def __init__(self, tool: Tool, prefix: str, quote: str, without: str):
        self.lines: list[str] = []
        self._tool, self._prefix, self._quote, self._without = tool, prefix, quote, without
        self._named: dict[str, str] = {}                         # rules of what is referred to
        self._any, self._count = "", 0

    def rule(self, schema: Any, where: str) -> str:
        """Return the name of a rule for values of a schema. Raises RequestError for what cannot be held."""
        name = self._new()
        self._fill(name, schema, where)
        return name

    def _new(self) -> str:
        self._count += 1
        return f"{self._prefix}v{self._count}"

    def _fill(self, name: str, schema: Any, where: str) -> None:
        """Write the rule `name`, and those that it needs."""
        if not isinstance(schema, Mapping):
            schema = {} if schema else {"not": {}}
        for keyword in ("not", "if", "prefixItems", "contains", "uniqueItems", "patternProperties", "dependentSchemas"):
            if keyword in schema:
                raise RequestError(f"{where}.{keyword}: cannot be enforced in this model's notation; leave it out")
        body = self._body(name, schema, where)
        self.lines.append(f"{name}: {body}")

    def _body(self, name: str, schema: Mapping[str, Any], where: str) -> str:
        if "$ref" in schema:
            return self._referred(schema["$ref"], where)
        if "enum" in schema or "const" in schema:
            return " | ".join(self._literal(value) for value in schema.get("enum", [schema.get("const")]))
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                base = {key: value for key, value in schema.items() if key not in (keyword, "description", "title", "default")}
                return " | ".join(self.rule({**base, **part} if isinstance(part, Mapping) else part, f"{where}.{keyword}[{n}]")
                                  for n, part in enumerate(schema[keyword]))
        if "allOf" in schema:
            if len(schema["allOf"]) != 1:
                raise RequestError(f"{where}.allOf: cannot be enforced in this model's notation; write one schema")
            return self.rule({**{key: value for key, value in schema.items() if key != "allOf"}, **schema["allOf"][0]}, f"{where}.allOf[0]")
        kind = schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else None)
        if isinstance(kind, list):
            return " | ".join(self.rule({**schema, "type": one}, where) for one in kind)
        if kind in ("number", "integer"):
            return json_value(schema, self._tool)
        if kind is None:
            return self._anything()
        return {"string": self._text, "boolean": self._switch, "null": self._nothing, "array": self._array, "object": self._object}[kind](
            name, schema, where)

    def _switch(self, name: str, schema: Mapping[str, Any], where: str) -> str:
        return '"true" | "false"'

    def _nothing(self, name: str, schema: Mapping[str, Any], where: str) -> str:
        return '"null"'

    def _text(self, name: str, schema: Mapping[str, Any], where: str) -> str:
        self.lines += text_rules(f"{name}_t", schema, self._without, self._quote)
        return f"{self._quote} {name}_t"

    def _array(self, name: str, schema: Mapping[str, Any], where: str) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[" "]"'
        item = self.rule(schema.get("items", {}), f"{where}.items")
        more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        return f'"[" {item} {more} "]"{"" if least else " | " + chr(34) + "[" + chr(34) + " " + chr(34) + "]" + chr(34)}'

    def _object(self, name: str, schema: Mapping[str, Any], where: str) -> str:
        if "properties" not in schema and schema.get("additionalProperties", True) is not False and not schema.get("required"):
            return self._map(schema.get("additionalProperties", {}), where)
        items = [(f"{self._key(key)} {self.rule(value, f'{where}.properties.{key}')}", needed) for key, value, needed in properties_of(schema, where)]
        self.lines += ordered(f"{name}_o", items, ",")
        return f'"{{" {name}_o0 "}}"'

    def _map(self, schema: Any, where: str) -> str:
        value = self.rule(schema, f"{where}.additionalProperties") if schema not in ({}, True) else self._anything()
        item = f'/[A-Za-z_][A-Za-z0-9_]*/ ":" {value}'
        return f'"{{" ({item} ("," {item})*)? "}}"'

    def _key(self, key: str) -> str:
        plain = key.replace("_", "a").replace("-", "a").isalnum()
        return json.dumps(f"{key}:", ensure_ascii=False) if plain else f'{self._quote} {json.dumps(key, ensure_ascii=False)} {self._quote} ":"'

    def _referred(self, target: Any, where: str) -> str:
        parts = target.split("/") if isinstance(target, str) else []
        if len(parts) != 3 or parts[0] != "#" or parts[1] not in ("$defs", "definitions") or parts[2] not in self._tool.parameters.get(parts[1], {}):
            raise RequestError(f"{where}.$ref: only what stands in $defs or definitions can be referred to, not {target!r}")
        if target not in self._named:
            self._named[target] = self._new()
            self._fill(self._named[target], self._tool.parameters[parts[1]][parts[2]], f"{parts[1]}.{parts[2]}")
        return self._named[target]

    def _anything(self) -> str:
        """Return the rule of any value."""
        if not self._any:
            self._any = self._new()
            text = f"{self._any}_t"
            self.lines += text_rules(text, {}, self._without, self._quote)
            anything, item = self._any, f'/[A-Za-z_][A-Za-z0-9_]*/ ":" {self._any}'
            number = json_rule({"type": "number"})
            self.lines.append(f"{anything}_n: {number}")
            self.lines.append(
                f'{anything}: {self._quote} {text} | {anything}_n | "true" | "false" | "null" | "[" ({anything} ("," {anything})*)? "]"'
                f' | "{{" ({item} ("," {item})*)? "}}"')
        return self._any

    def _literal(self, value: Any) -> str:
        """Return a fragment for one value."""
        if isinstance(value, str):
            return f"{self._quote} {json.dumps(value, ensure_ascii=False)} {self._quote}" if value else f"{self._quote} {self._quote}"
        if isinstance(value, Mapping):
            parts = [f"{self._key(key)} {self._literal(v)}" for key, v in value.items()]
            return '"{" ' + ' "," '.join(parts) + ' "}"'
        if isinstance(value, list):
            return '"[" ' + ' "," '.join(map(self._literal, value)) + ' "]"'
        return json.dumps(json.dumps(value))
