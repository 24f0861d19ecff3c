"""Whatever a template is, compiling and rendering it ends in time and in little memory, with TemplateError or a text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, HealthCheck, settings, strategies as st

import attacks
from pyengine.chat import budget, dialect, helper, template
from pyengine.chat.template import ChatTemplate
from pyengine.errors import TemplateError

HERE = Path(__file__).parent
ERRORS = ("pyengine.errors.TemplateError: ", "pyengine.chat.helper.OverBudget: ")
LATE = 2.5                                         # seconds, where other tests keep the machine busy
EVERY = 16                                         # of which the default tests take one

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the attacks run under Linux's limits of memory")


def outcomes(kind: str, names: Sequence[str]) -> dict[str, list]:
    run = subprocess.run([sys.executable, str(HERE.parent / "support" / "attacks.py"), kind, *names], capture_output=True, text=True,
                         env={"PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent / 'support'}"}, timeout=900)
    assert run.returncode == 0, run.stderr
    return {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}


def faults(kind: str, found: dict[str, list]) -> Iterable[str]:
    may_end = attacks.MAY_END.get(kind, ())
    for name, (said, seconds, here, apart) in found.items():
        if not said.startswith(ERRORS) and not (name in may_end and said.startswith("text ")):
            yield f"{name}: {said[:200]}"
        if seconds > attacks.SECONDS + LATE:
            yield f"{name}: {seconds} s"
        if here > attacks.MIB / 2 or apart > attacks.MIB:
            yield f"{name}: {here} MiB in this process, {apart} MiB in the helper"


@pytest.mark.parametrize("kind", attacks.KINDS)
def test_some_attacks(kind: str) -> None:
    names = list(attacks.KINDS[kind])[::EVERY]
    found = outcomes(kind, names)
    assert list(found) == names and not list(faults(kind, found))


@pytest.mark.slow
@pytest.mark.parametrize("kind", attacks.KINDS)
def test_all_attacks(kind: str) -> None:
    found = outcomes(kind, [])
    assert list(found) == list(attacks.KINDS[kind]) and not list(faults(kind, found))


def test_the_seconds_are_for_compiling_probing_and_rendering_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert helper.MAX_SECONDS == 5
    monkeypatch.setattr(helper, "MAX_SECONDS", 1.5)
    started = time.monotonic()
    with pytest.raises(TemplateError, match="1.5 s and 160 MiB"):
        ChatTemplate("{{ 1 | round(1000000000, 'ceil') }}").render([{"role": "user", "content": "x"}])
    assert time.monotonic() - started < helper.MAX_SECONDS + LATE


# -- random templates ------------------------------------------------------------------------------------------------

NAMES = ("messages", "m", "a", "n", "x", "loop", "f")
VALUES = {"messages": [{"role": "user", "content": "hé <b>"}, {"role": "assistant", "content": "", "calls": [{"a": 1, "b": [1.5, None]}]}],
          "a": "a b,c", "n": 3, "m": {"k": [1, 2], "role": "x"}}
_constants = st.sampled_from(["0", "1", "2", "-1", "1.5", "''", "'a'", "'b '", "'%s'", "'{}'", "true", "false", "none", "[]", "{}", "()", "'é'", "[1, 'a']",
                              "{'k': 1}", "(1, 2)", "range(3)"])
_atoms = st.one_of(_constants, st.sampled_from(NAMES))
_filters = st.sampled_from([name for name in dialect.Environment().filters if name not in ("random", "pprint", "urlize")])
_tests = st.sampled_from([name for name in dialect.Environment().tests if name.isalpha()])
_methods = st.sampled_from("strip split upper title startswith replace join items keys get values format index count append pop role content k first "
                           "index0 length cycle previtem center encode".split())


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operators = st.sampled_from(["+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or"])
    arguments = st.lists(inner, max_size=2).map(", ".join)
    return st.one_of(
        st.builds("({} {} {})".format, inner, operators, inner), st.builds("({} | {})".format, inner, _filters),
        st.builds("({} | {}({}))".format, inner, _filters, arguments), st.builds("({} is {})".format, inner, _tests),
        st.builds("({} is {}({}))".format, inner, _tests, inner), st.builds("{}.{}".format, inner, _methods),
        st.builds("{}.{}({})".format, inner, _methods, arguments), st.builds("{}[{}]".format, inner, inner),
        st.builds("{}[{}:{}]".format, inner, inner, inner), st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("[{}, {}]".format, inner, inner), st.builds("{{'k': {}, 1: {}}}".format, inner, inner),
        st.builds("(not {})".format, inner),
        st.builds("({} | map('{}') | list)".format, inner, _filters),
        st.builds("({} | select('{}', {}) | list)".format, inner, _tests, inner),
        st.builds("f({})".format, arguments), st.builds("namespace(k={})".format, inner), st.builds("dict(k={})".format, inner))


EXPRESSIONS = st.recursive(_atoms, _grown, max_leaves=5)


def _nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, EXPRESSIONS, inner, inner),
        st.builds("{{% for x in {} %}}{}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% for x in {} if {} %}}{}{{% endfor %}}".format, EXPRESSIONS, EXPRESSIONS, inner),
        st.builds("{{% set x %}}{}{{% endset %}}".format, inner),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, _filters, inner),
        st.builds("{{% macro f(x, y={}) %}}{}{{% endmacro %}}".format, EXPRESSIONS, inner),
        st.builds("{{% call f({}) %}}{}{{% endcall %}}".format, EXPRESSIONS, inner),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
        st.builds("{{% with x = {} %}}{}{{% endwith %}}".format, EXPRESSIONS, inner))


TEMPLATES = st.recursive(st.one_of(st.builds("{{{{ {} }}}}".format, EXPRESSIONS), st.sampled_from(["text", "\n  ", "{% break %}", "{{ loop.index }}"]),
                                   st.builds("{{% set x = {} %}}".format, EXPRESSIONS)), _nested, max_leaves=5)


def without_addresses(text: str) -> str:
    return re.sub(r"<[^<>]* at 0x[0-9a-f]+>|0x[0-9a-f]{6,}", "?", text)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(TEMPLATES)
def test_random_templates_give_what_jinja_gives(source: str) -> None:
    """In this process, or not at all: never another text, and an error where jinja2 has one."""
    try:
        want: str | None = dialect.Environment().from_string(source).render(template._plain(VALUES))
    except Exception:
        want = None
    token = budget.current_budget.set(budget.Budget(time.monotonic() + 60))
    try:
        found: str | None = template._sandbox().from_string(source).render(template._plain(VALUES))
    except budget.Outside:
        return
    except Exception:
        found = None
    finally:
        budget.current_budget.reset(token)
    assert (found is None) == (want is None), (source, found, want)
    assert want is None or without_addresses(found) == without_addresses(want), source


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(TEMPLATES)
def test_random_templates_end(source: str) -> None:
    started = time.monotonic()
    try:
        ChatTemplate(source).render([{"role": "user", "content": "hé <b>"}], variables={k: VALUES[k] for k in "amn"})
    except TemplateError:
        pass
    assert time.monotonic() - started < helper.MAX_SECONDS + LATE


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text("{}%#-+ 'abifforset|.()[]\n0", max_size=60))
def test_random_letters_are_a_template_or_malformed(source: str) -> None:
    try:
        ChatTemplate(source)
    except TemplateError:
        pass
