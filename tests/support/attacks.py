"""Templates that try to take a machine's time or memory, by kind; run as a program, each in a process that is ended if it succeeds.

    python attacks.py KIND [NAME ...]      prints one JSON line for each: [name, what came of it, seconds, MiB here, MiB of the helper]
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time

SECONDS = 1.2                                      # instead of 5, so that the tests end
MIB = 256                                          # beyond what is there before
HUGE = "10 ** 10"


def repeat(step: str, start: str, times: int = 60, end: str = "") -> str:
    """A namespace's x, changed over and over."""
    return "{% set n = namespace(x=" + start + ") %}{% for i in range(" + str(times) + ") %}{% set n.x = " + step + " %}{% endfor %}" + end


LETTERS = "{% set s = 'a' * 1000000 %}"
TREE = "{% set n = namespace(x=1, y=1) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}"
TUPLES = TREE.replace("[", "(").replace("]", ")")
SPACES = TREE.replace("[n.x, n.x]", "namespace(a=n.x, b=n.x)")
BIG = "{% set m = messages | length %}{% set b = ('f' * 30000000 * m) | int(0, 16) %}"
FORMAT_TEXT = "{% set t = '%' ~ '99999999999d' %}"

KINDS: dict[str, dict[str, str]] = {
    # The values are constants, so that a compiler that folds them never gets to run.
    "compiling": {
        "power": "{{ 9 ** (9 ** 9) }}", "power of powers": "{{ 2 ** 99999999999 }}",
        "negative power": "{{ 1 // 10 ** (10 ** 10) }}",
        "times": "{{ 'x' * 9999999999 }}", "list": "{{ [0] * 9999999999 }}", "tuple": "{{ (0,) * 9999999999 }}",
        "ceil": "{{ 1 | round(1000000000, 'ceil') }}", "floor": "{{ 1 | round(1000000000, 'floor') }}",
        "round up": "{{ 1 | round(-1000000000) }}", "center": "{{ 'x' | center(9999999999) }}",
        "replace": "{{ 'x' | replace('x', 'xxxxxxxx' * 1000000000) }}", "format": "{{ '%9999999999d' | format(1) }}",
        "percent": "{{ '%9999999999d' % 1 }}", "precision": "{{ '%.999999999f' % 1.5 }}",
        "indent": "{{ 'x\ny' | indent(9999999999) }}",
        "lipsum": "{{ lipsum(n=10000000) }}", "in a test": "{% if 'x' * 9999999999 %}{% endif %}",
        "in a default": "{% macro f(a='x' * 9999999999) %}{% endmacro %}{{ f() }}",
        "in a filter's argument": "{{ 1 | default('x' * 9999999999) }}",
        "in a slice": "{{ ('x' * 9999999999)[:1] }}", "in a comparison": "{{ 'x' * 9999999999 == 'y' }}",
        "in a condition": "{{ 'a' if 'x' * 9999999999 else 'b' }}", "joined": "{{ ['a', 'b'] | join('x' * 9999999999) }}",
        "batch": "{{ [1] | batch(9999999999, 0) | list }}", "slice": "{{ [1] | slice(9999999999, 0) | list }}",
        "odd": "{{ '%9999999999d' is odd }}", "divisible": "{{ '%9999999999d' is divisibleby(2) }}",
        "sum": "{{ ['a' * 9999999999] | sum(start='') }}", "wordwrap": "{{ 'a' * 9999999999 | wordwrap(1) }}",
        "tojson": "{{ [1] | tojson(indent=9999999999) }}",
    },
    "numbers": {
        "ceil": "{{ (messages | length) | round(1000000000, 'ceil') }}", "common": "{{ (messages | length) | round(-1000000000) }}",
        "floor": "{{ (messages | length) | round(999999999, 'floor') }}",
        "mapped": "{{ [1] | map('round', 1000000000, 'ceil') | list }}",
        "divide": BIG + "{% set a = ('f' * 15000000 * m) | int(0, 16) %}{{ 0 if b // a }}",
        "remainder": BIG + "{% set a = ('f' * 15000000 * m) | int(0, 16) %}{% set c = b % a %}",
        "true division": BIG + "{{ b / 3 }}", "print": BIG + "{{ b }}", "print, joined": BIG + "{{ [b] | join }}",
        "print, json": BIG + "{{ b | tojson }}",
        "print, concatenated": BIG + "{% set x = b ~ '' %}", "print, formatted": BIG + "{% set x = '%d' % b %}",
        "print, hexadecimal": BIG + "{% for i in range(999) %}{% set x = '%x' % b %}{% endfor %}",
        "print, format method": BIG + "{% set x = '{}'.format(b) %}",
        "multiply": BIG + "{% for i in range(99) %}{% set c = b * b %}{% endfor %}",
        "power": "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",
        "power of a product": "{% set n = 9 * 9 %}{{ (n ** n) ** (n ** n) }}",
        "squares": repeat("n.x * n.x", "9"), "squares by power": repeat("n.x ** 2", "9"),
        "doubles": repeat("n.x + n.x", "1", 99999, "{{ n.x }}"),
        "doubles by product": repeat("n.x * 2", "1", 99999, "{{ n.x }}") * 3,
        "factorial": repeat("n.x * (i + 1)", "1", 99999, "{{ n.x }}"),
        "fibonacci": "{% set n = namespace(a=1, b=1) %}{% for i in range(99999) %}{% set c = n.a + n.b %}{% set n.a = n.b %}{% set n.b = c %}{% endfor %}" * 20 + "{{ n.b }}",
        "sum": "{{ ([10 ** 1000] * 1000) | sum ** 999999999 }}", "int of a power": "{{ (9 ** (9 ** 9)) | int }}",
        "float of a power": "{{ (9 ** (9 ** 9)) | float }}",
        "abs": "{{ (-(9 ** (9 ** 9))) | abs }}", "filesizeformat": "{{ (9 ** (9 ** 9)) | filesizeformat }}",
        "range": "{% for i in range(9 ** (9 ** 9)) %}{% endfor %}",
        "decimal int": "{{ ('9' * 30000000) | int }}", "int base 7": "{{ ('6' * 30000000) | int(0, 7) }}",
        "compare": "{{ 9 ** (9 ** 9) == 9 ** (9 ** 8) }}",
        "as_integer_ratio": "{{ (1.5).as_integer_ratio()[0] ** 9 ** (9 ** 9) }}",
        "to_bytes": "{{ (1).to_bytes(99999999999, 'big') }}", "from bool": "{{ (true + 8) ** (9 ** 9) }}",
        "shift by product": "{% set b = 2 ** 1000 %}" + repeat("n.x * n.x", "2 ** 1000"),
    },
    # A value that holds itself twice, sixty times over, has 2 ** 60 parts, in some kilobytes.
    "shared parts": {
        **{f"{name} of {what}": tree + "{% set z = " + f.replace("X", "n.x").replace("Y", "n.y") + " %}" for what, tree in
           (("lists", TREE), ("tuples", TUPLES), ("namespaces", SPACES)) for name, f in {
               "string": "X | string", "concatenation": "X ~ ''", "pprint": "X | pprint", "join": "[X] | join",
               "format": "'%s' % (X,)",
               "format method": "'{}'.format(X)", "upper": "X | upper", "trim": "X | trim", "replace": "X | replace('a', 'b')",
               "escape": "X | e", "urlencode": "X | urlencode"}.items()},
        **{f"{name} of {what}": tree + "{% set z = " + f.replace("X", "n.x").replace("Y", "n.y") + " %}" for what, tree in
           (("lists", TREE), ("tuples", TUPLES)) for name, f in {
               "equal": "X == Y", "unequal": "X != Y", "less": "X < Y", "in": "X in [Y]", "not in": "X not in [Y]",
               "test": "X is eq(Y)",
               "select": "[X] | select('eq', Y) | list", "selectattr": "[{'a': X}] | selectattr('a', 'eq', Y) | list",
               "json": "X | tojson",
               "sort": "[X, Y] | sort", "max": "[X, Y] | max", "index": "[X].index(Y)", "count": "[X].count(Y)",}.items()
           },
        "output": TREE + "{{ n.x }}", "output of namespaces": SPACES + "{{ n.x }}",
        "output in a block": TREE + "{% set y %}{{ n.x }}{% endset %}",
        "hash of a key": TUPLES + "{% set z = {n.x: 1} %}", "hash of an index": TUPLES + "{{ {}[n.x] }}",
        "hash in get": TUPLES + "{{ {}.get(n.x) }}",
        "hash in in": TUPLES + "{{ n.x in {} }}", "hash in unique": TUPLES + "{{ [n.x] | unique | list }}",
        "hash in a test": TUPLES + "{{ n.x is filter }}",
        "hash in groupby": TUPLES + "{{ [{'a': n.x}, {'a': n.y}] | groupby('a') | list }}",
        "hash in fromkeys": TUPLES + "{{ dict.fromkeys([n.x]) }}",
        "hash in dict": TUPLES + "{{ dict([(n.x, 1)]) }}",
        "loop.changed": TREE + "{% for i in range(9) %}{{ loop.changed([n.x, n.y][i % 2]) }}{% endfor %}",
        "maps": repeat("{'a': n.x, 'b': n.x}", "1", 60, "{{ n.x }}"),
        "maps, json": repeat("{'a': n.x, 'b': n.x}", "1", 60, "{{ n.x | tojson }}"),
        "maps, compared": TREE.replace("[n.x, n.x]", "{'a': n.x, 'b': n.x}").replace("[n.y, n.y]", "{'a': n.y, 'b': n.y}")
        + "{% set z = n.x == n.y %}",
        "itself": "{% set l = [] %}{{ l.append(l) }}{{ l.append(l) }}{{ l == [l] }}{{ l | tojson }}",
        "two of themselves": "{% set a = [] %}{% set b = [] %}{{ a.append(b) }}{{ b.append(a) }}{{ a.append(b) }}{{ b.append(a) }}{{ a == b }}",
        "a namespace in itself": "{% set n = namespace(x=1) %}{% set n.x = [n, n] %}{{ n }}{{ n.x | tojson }}",
        "depth": repeat("[n.x]", "1", 99999, "{{ n.x }}"), "depth, json": repeat("[n.x]", "1", 99999, "{{ n.x | tojson }}"),
        "depth, compared": "{% set n = namespace(x=1, y=1) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% set n.y = [n.y] %}{% endfor %}{{ n.x == n.y }}",
        "depth of tuples, hashed": repeat("(n.x,)", "1", 99999, "{{ {n.x: 1} }}"),
        "depth of namespaces": repeat("namespace(a=n.x)", "1", 99999, "{{ n.x }}"),
        "appended": "{% set l = [1] %}{% for i in range(60) %}{{ l.append(l * 1) }}{% endfor %}{{ l }}",
    },
    "formats": {
        **{f"percent {f}": "{% set x = '" + f + "' % " + v + " %}" for f, v in {
            "%9999999999d": "1", "%09999999999d": "1", "%-9999999999d": "1", "%+9999999999d": "1", "% 9999999999d": "1",
            "%#9999999999x": "1",
            "%9999999999s": "'a'", "%.999999999f": "1.5", "%.999999999e": "1.5", "%.999999999g": "1.5", "%.999999999d": "1",
            "%999999999.999999999f": "1.5",
            "%*d": "(1999999999, 1)", "%.*f": "(999999999, 1.5)", "%(a)1999999999d": "{'a': 1}", "%(a)s%(a)1999999999s": "{'a': 1}",
            "%()1999999999d": "{'': 1}",
            "%(%)1999999999d": "{'%': 1}", "%(a(b)c)1999999999d": "{'a(b)c': 1}", "%(a*)1999999999d": "{'a*': 1}",
            "%1999999999r": "1", "%1999999999a": "1", "%1999999999c": "'a'",
            "%%%1999999999d": "1", "%1999999999%": "()"}.items()},
        **{f"method {f}": "{% set x = '" + f + "'.format(" + v + ") %}" for f, v in {
            "{:9999999999}": "1", "{:>9999999999}": "1", "{:^1999999999}": "'a'", "{:01999999999}": "1", "{:x<1999999999}": "'a'",
            "{:.999999999f}": "1.5",
            "{:{}}": "1, 1999999999", "{:{w}}": "1, w=1999999999", "{0:{1}}": "1, 1999999999", "{a:1999999999}": "a=1",
            "{a[b]:1999999999}": "a={'b': 1}",
            "{0[0]:1999999999}": "[1]", "{!r:1999999999}": "1", "{!s:>1999999999}": "1", "{:,.999999999f}": "1.5",
            "{:1999999999,}": "1"}.items()},
        "width from a value": FORMAT_TEXT + "{{ t % 1 }}", "width from a message": "{{ ('%' ~ messages[0].width ~ 'd') % 1 }}",
        "filter": "{{ '%9999999999d' | format(1) }}",
        "filter, by key": "{{ '%(a)1999999999d' | format(a=1) }}", "format_map": "{{ '{a:1999999999}'.format_map({'a': 1}) }}",
        "stored": "{% set f = '{:1999999999}'.format %}{{ f(1) }}",
        "mapped": "{{ ['%1999999999d'] | map('format', 1) | list }}",
        "many fields": "{% set s = 'x' * 1000000 %}{{ ('%s' * 9999) % ([s] * 9999) }}",
        "many fields of a map": "{% set s = 'x' * 1000000 %}{{ ('%(a)s' * 9999) % {'a': s} }}",
        "many fields of a method": "{% set s = 'x' * 1000000 %}{{ ('{0}' * 9999).format(s) }}",
        "many empty fields": "{% set x = ('{0}' * 9000000).format('') %}" * 20,
        "odd": "{{ ['%1999999999d'] | select('odd') | list }}", "even": "{{ '%1999999999d' is even }}",
        "divisibleby": "{{ '%(a)1999999999d' is divisibleby({'a': 1}) }}",
        "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
        "doubling by method": repeat("'{0}{0}'.format(n.x)", "'x'"),
        "doubling by filter": repeat("'%s%s' | format(n.x, n.x)", "'x'"),
        "ljust": "{{ 'x'.ljust(" + HUGE + ") }}", "rjust": "{{ 'x'.rjust(" + HUGE + ") }}",
        "center": "{{ 'x'.center(" + HUGE + ") }}", "zfill": "{{ '1'.zfill(" + HUGE + ") }}",
        "expandtabs": "{{ '\t'.expandtabs(1999999999) }}", "center filter": "{{ 'x' | center(" + HUGE + ") }}",
        "translate": "{{ ('x' * 9000000).translate({120: 'yyyyyyyyyyyyyyyyyyyyyyyyyyyy'}) }}",
        "ljust, by item": "{{ 'x'['ljust'](" + HUGE + ") }}", "zfill, by attr": "{{ ('x' | attr('zfill'))(" + HUGE + ") }}",
        "many pads": "{% for i in range(99999) %}{{ 'x'.ljust(30000) }}{% endfor %}",
    },
    "growing": {
        **{f"{name} of {what}": repeat(step, start) for what, start in (("text", "'x'"), ("lists", "[1]"), ("tuples", "(1,)"), ("bytes", "'x'.encode()"))
           for name,
           step in {"adding": "n.x + n.x", "product": "n.x * 2", "product from the left": "2 * n.x", "product by itself": "n.x * (n.x | length + 1)"}.items()},
        "concatenating": repeat("n.x ~ n.x", "'x'"), "four-byte letters": repeat("n.x ~ n.x", "'\U0001f600'"),
        "replace": repeat("n.x.replace('x', 'xx')", "'x'"), "replace filter": repeat("n.x | replace('x', 'xx')", "'x'"),
        "join": repeat("[n.x, n.x] | join", "'x'"), "join method": repeat("n.x.join(['x', 'x', 'x'])", "'x'"),
        "upper": repeat("(n.x ~ 'ŉ') | upper ~ n.x", "'ŉ'"),
        "block": "{% set x = 'x' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
        "tojson": repeat("n.x | tojson", "'\"'"),
        "tojson to ASCII": repeat("n.x | tojson(ensure_ascii=true) ~ n.x", "'\U0001f600'"),
        "repr": repeat("[n.x] | string", "'\\''"), "escape": repeat("(n.x | string) | e", "'&'", 9999),
        "urlencode": repeat("n.x | urlencode", "'%'", 9999),
        "macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + repeat("f(n.x)", "'x'"),
        "call block": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 40 + "x" + "{% endcall %}" * 40,
        "filter block": "{% filter replace('x', 'xx') %}" * 40 + "x" + "{% endfilter %}" * 40,
        "slices": repeat("n.x[:] + n.x[:]", "'x'"), "list of a text": repeat("(n.x | list) + (n.x | list)", "'x'"),
        "append": "{% set l = [1] %}{% for i in l %}{{ l.append(i) }}{% endfor %}",
        "append text": "{% set l = [] %}{% for i in range(99999) %}{{ l.append('x' * 99999 ~ i) }}{% endfor %}",
        "generator's list": repeat("(n.x + n.x) | map('string') | list", "[1]"),
        "sum of lists": repeat("[n.x, n.x] | sum(start=[])", "[1]"),
        "split": "{% set s = ',' * 30000000 %}{% set x = s.split(',') %}",
        "split on blanks": "{% set s = 'a ' * 15000000 %}{% set x = s.split() %}",
        "splitlines": "{% set x = ('\n' * 30000000).splitlines() %}", "list": "{% set x = ('\U0001f600x' * 9000000) | list %}",
        "rsplit": "{% set x = (',' * 30000000).rsplit(',') %}",
        "partition": "{% set l = [] %}{% set s = 'x' * 9000000 %}{% for i in range(999) %}{{ l.append(s.partition('y' )) }}{{ l.append(s + '1') }}{% endfor %}",
        "encode": "{% set l = [] %}{% set s = 'x' * 9000000 %}{% for i in range(999) %}{{ l.append(s.encode()) }}{% endfor %}",
        "batch": "{{ range(99999) | batch(1) | map('list') | list | string * 999 }}",
        "batch that fills": "{{ [1] | batch(" + HUGE + ", 'x') | list }}", "slice": "{{ range(9) | slice(" + HUGE + ") | list }}",
        "titles": "{% set x = ('a ' * 9000000) | title %}",
        "wordwrap": "{% set x = ('a ' * 9000000) | wordwrap(1, wrapstring='x' * 9999) %}",
        "urlize": "{% set x = ('a.com ' * 5000000) | urlize %}", "xmlattr": "{% set x = {'a': '&' * 30000000} | xmlattr %}",
        "pprint": "{% set x = (range(99999) | list * 99) | pprint %}",
        "dictsort": "{% set x = dict([('a', 'x' * 90000000)]) | dictsort %}",
        "products of a range": "{% set x = (range(99999) | list) * 999 %}",
        "zip of texts": "{% set x = ['x' * 90000000] * 9 %}{% set y = x | join %}",
    },
    "many values": {
        "texts": "".join("{%% set a%d = 'x' * 30000000 ~ 'y' %%}" % i for i in range(100)),
        "texts in a namespace": "{% set n = namespace() %}" + "".join("{%% set n.a%d = 'x' * 30000000 ~ 'y' %%}" % i for i in range(100)),
        "lists": "".join("{%% set a%d = [1] * 3000000 %%}" % i for i in range(100)),
        "bytes": "".join("{%% set a%d = ('x' * 30000000).encode() %%}" % i for i in range(100)),
        "loops": "{% set l = [] %}{% for i in range(99999) %}{{ l.append(['x'] * 999) }}{% endfor %}",
        "macros' arguments": "{% macro f(n, x) %}{{ f(n - 1, x ~ 'y') if n }}{% endmacro %}{{ f(200, 'x' * 9000000) }}",
        "closures": "{% set l = [] %}{% for i in range(9999) %}{% set s = 'x' * 99999 ~ i %}{% macro f() %}{{ s }}{% endmacro %}{{ l.append(f) }}{% endfor %}",
        "namespaces": "{% set l = [] %}{% for i in range(99999) %}{% for j in range(99) %}{{ l.append(namespace(a=i, b=j)) }}{% endfor %}{% endfor %}",
        "maps": "{% set l = [] %}{% for i in range(99999) %}{% for j in range(99) %}{{ l.append({'a': i, 'b': j}) }}{% endfor %}{% endfor %}",
        "maps of keywords": "{% set l = [] %}{% for i in range(99999) %}{% for j in range(99) %}{{ l.append(dict(a=i, b=j)) }}{% endfor %}{% endfor %}",
        "cyclers": "{% set l = [] %}{% for i in range(99999) %}{% for j in range(99) %}{{ l.append(cycler(1, 2)) }}{% endfor %}{% endfor %}",
        "slices": "{% set l = [] %}{% set s = 'x' * 900000 %}{% for i in range(9999) %}{{ l.append(s[i:]) }}{% endfor %}",
        "slices of lists": "{% set l = [] %}{% set s = [1] * 90000 %}{% for i in range(9999) %}{{ l.append(s[i:]) }}{% endfor %}",
        "pieces": "{% set l = [] %}{% set s = 'x' * 900000 %}{% for i in range(9999) %}{{ l.append(s.split('y')) }}{{ l.append(s.strip() ~ i) }}{% endfor %}",
        "copies by true": "{% set l = [] %}{% set s = [1] * 900000 %}{% for i in range(9999) %}{{ l.append(s * true) }}{% endfor %}",
        "copies by one": "{% set l = [] %}{% set s = [1] * 900000 %}{% for i in range(9999) %}{{ l.append(s * 1) }}{% endfor %}",
        "copies of texts": "{% set l = [] %}{% set s = 'x' * 900000 %}{% for i in range(9999) %}{{ l.append(s.upper()) }}{% endfor %}",
        "lists of generators": "{% set l = [] %}{% for i in range(9999) %}{{ l.append(range(99999) | map('string') | list) }}{% endfor %}",
        "items": "{% set d = dict.fromkeys(range(99999)) %}{% set l = [] %}{% for i in range(9999) %}{{ l.append(d | items | list) }}{% endfor %}",
        "reversed": "{% set l = [] %}{% for i in range(9999) %}{{ l.append(([1] * 99999) | reverse | list) }}{% endfor %}",
        "sorted": "{% set l = [] %}{% for i in range(9999) %}{{ l.append(range(99999) | sort) }}{% endfor %}",
        "ranges": "{% set l = [] %}{% for i in range(9999) %}{{ l.append(range(99999) | list) }}{% endfor %}",
        "groups": "{% set l = [] %}{% for i in range(9999) %}{{ l.append([{'a': 1}] * 99999 | groupby('a')) }}{% endfor %}",
        "loop.length": "{% set d = [1] * 99999 %}{% for i in range(99999) %}{% for k in d | reverse %}{{ loop.length }}{% break %}{% endfor %}{% endfor %}",
        "safe": "{% set l = [] %}{% set s = 'x' * 900000 %}{% for i in range(9999) %}{{ l.append(s | safe) }}{% endfor %}",
        "arguments": "{% macro f() %}{{ varargs | length }}{% endmacro %}{% for i in range(9999) %}{{ f(*range(99999)) }}{% endfor %}",
        "variables by exec": "".join("{%% set a%d %%}%s{%% endset %%}" % (i, "{{ 'x' * 9000000 }}") for i in range(200)),
    },
    "output": {
        "of a loop": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "of a loop's text": "{% for i in range(99999) %}" + "x" * 20000 + "{% endfor %}",
        "of nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "of a macro": "{% macro f() %}" + "x" * 20000 + "{% endmacro %}{% for i in range(99999) %}{{ f() }}{% endfor %}",
        "kept": "{% set y %}{% for i in range(99999) %}" + "x" * 20000 + "{% endfor %}{% endset %}{{ y | length }}",
        "kept, from macros": "{% macro f() %}" + "x" * 20000 + "{% endmacro %}{% set y %}{% for i in range(99999) %}{{ f() }}{% endfor %}{% endset %}",
        "filtered": "{% filter upper %}{% for i in range(99999) %}" + "x" * 20000 + "{% endfor %}{% endfilter %}",
        "of call blocks": "{% macro f() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}{% call f() %}" + "x" * 20000 + "{% endcall %}",
        "of a recursive loop": "{% for i in [[]] recursive %}" + "x" * 20000 + "{{ loop([[]]) }}{% endfor %}",
        "one text": "{{ 'x' * 300000000 }}", "one list": "{{ ['x' * 9999] * 99999 }}",
        "of four bytes": "{% for i in range(99999) %}{{ '\U0001f600' * 9999 }}{% endfor %}",
        "one wide letter": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}\U0001f600",
        "joined": "{{ (['x' * 9999] * 99999) | join }}",
        "blocks": "{% block a %}{% for i in range(99999) %}" + "x" * 20000 + "{% endfor %}{% endblock %}",
        "blocks again": "{% block a %}{{ 'x' * 9999 }}{% endblock %}{% for i in range(99999) %}{{ self.a() }}{% endfor %}",
        "generation": "{% for i in range(99999) %}{% generation %}" + "x" * 20000 + "{% endgeneration %}{% endfor %}",
        "cycled": "{% for i in range(99999) %}{{ loop.cycle('x' * 9999, 'y' * 9999) }}{% endfor %}",
        "joiner": "{% set j = joiner('x' * 9999) %}{% for i in range(99999) %}{{ j() }}{% endfor %}",
        "lipsum": "{{ lipsum(n=99999) }}" * 99,
        "autoescape": "{% autoescape true %}{% for i in range(99999) %}{{ '&' * 9999 }}{% endfor %}{% endautoescape %}",
        "with": "{% for i in range(99999) %}{% with a='x' * 9999 %}{{ a }}{% endwith %}{% endfor %}",
        "else": "{% for i in range(99999) %}{% for j in [] %}{% else %}" + "x" * 20000 + "{% endfor %}{% endfor %}",
        "if": "{% for i in range(99999) %}{% if i >= 0 %}" + "x" * 20000 + "{% endif %}{% endfor %}",
        "elif": "{% for i in range(99999) %}{% if i < 0 %}{% elif true %}" + "x" * 20000 + "{% endif %}{% endfor %}",
    },
    "loops": {
        "silent": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "filtered": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "filtered by a test": "{% for i in range(99999) %}{% for j in range(99999) if j is undefined %}{% endfor %}{% endfor %}",
        "mapped": "{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
        "selected": "{% for i in range(99999) %}{{ range(99999) | select('none') | first }}{% endfor %}",
        "rejected": "{% for i in range(99999) %}{{ range(99999) | reject('number') | first }}{% endfor %}",
        "by attribute": "{% for i in range(99999) %}{{ range(99999) | selectattr('x') | first }}{% endfor %}",
        "searched": "{% set l = [1] * 900000 %}{% for i in range(99999) %}{{ 2 in l }}{% endfor %}",
        "searched, in a line": "{% set l = [1] * 900000 %}" + "{{ 2 in l }}" * 3000,
        "searched range": "{% for i in range(99999) %}{{ 'x' in range(99999) }}{% endfor %}",
        "searched text": LETTERS + "{% for i in range(99999) %}{{ 'b' in s }}{% endfor %}",
        "searched by index": "{% set l = [1] * 90000 %}{% for i in range(99999) %}{{ l.count(2) }}{% endfor %}",
        "compared": "{% set a = [1] * 900000 %}{% set b = [1] * 900000 %}{% for i in range(99999) %}{{ a == b }}{% endfor %}",
        "compared texts": LETTERS + "{% set t = 'a' * 1000000 %}{% for i in range(99999) %}{{ s == t }}{% endfor %}",
        "sorted": "{% for i in range(99999) %}{{ (range(99999) | sort(reverse=true))[0] }}{% endfor %}",
        "sliced": "{% set l = [1] * 900000 %}{% for i in range(99999) %}{% set x = l[::-1] %}{% endfor %}",
        "measured": "{% set l = [1] * 900000 %}{% for i in range(99999) %}{{ (l | string) | length }}{% endfor %}",
        "generators": "{% set g = range(99999) | map('string') %}" + "{% for i in range(99999) %}{% set g = g | map('upper') %}{% for x in range(99999) | map('string') %}{% endfor %}{% endfor %}",
        "generators in generators": repeat("n.x | map('string')", "range(99999)", 5000, "{{ n.x | list | length }}"),
        "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "recursion of two": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
        "recursion by caller": "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{% call f() %}{% endcall %}",
        "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "tree of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(25) }}",
        "tree of loops": "{% for i in range(9) recursive %}{% if loop.depth < 20 %}{{ loop(range(9)) }}{% endif %}{% endfor %}",
        "tree of filters": "{% macro f(n) %}{% if n %}{% set x = [n - 1, n - 1] | map('string') | list %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(25) }}",
        "blocks in blocks": "{% block a %}{{ self.a() }}{% endblock %}",
        "endless": "{% set l = [1] %}{% for i in l %}{% set _ = l.append(1) %}{% endfor %}",
        "endless, filtered": "{% set l = [1] %}{% for i in l if l.append(1) %}{% endfor %}",
        "endless map": "{% set l = [1] %}{% for i in l | map('string') %}{% set _ = l.append(1) %}{% endfor %}",
        "conditions": "{% for i in range(99999) %}{% for j in range(99999) %}{% if i %}{% elif j %}{% endif %}{% endfor %}{% endfor %}",
        "length by loop": "{% for i in range(99999) %}{% for j in range(99999) | map('string') %}{{ loop.length }}{% break %}{% endfor %}{% endfor %}",
        "last": "{% for i in range(99999) %}{% for j in range(99999) %}{% if loop.last %}{% endif %}{% endfor %}{% endfor %}",
        "groupby": "{% for i in range(99999) %}{{ (range(99999) | groupby('real')) | length }}{% endfor %}",
        "random": "{% for i in range(99999) %}{% for j in range(99999) %}{{ [] if [1, 2] | random }}{% endfor %}{% endfor %}",
        "unpacked": "{% for i in range(99999) %}{% for a, b in {'a': 1}.items() %}{% endfor %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    },
    # Searching backwards, stripping and patterns take the product of two lengths.
    "products of lengths": {
        **{name: LETTERS + "{% set b = 'ab' ~ 'a' * 500000 %}{% set z = " + f + " %}" for name, f in {
            "rsplit": "s.rsplit(b)", "rpartition": "s.rpartition(b)", "rfind": "s.rfind(b)", "rindex": "s.rindex(b)"}.items()},
        "strip": "{% set s = 'a' * 9000000 %}{% set z = s.strip('b' * 9000000 ~ 'a') %}",
        "lstrip": "{% set s = 'a' * 9000000 %}{% set z = s.lstrip('b' * 9000000 ~ 'a') %}",
        "rstrip": "{% set s = 'a' * 9000000 %}{% set z = s.rstrip('b' * 9000000 ~ 'a') %}",
        "trim": "{% set s = 'a' * 9000000 %}{% set z = s | trim('b' * 9000000 ~ 'a') %}",
        "rsplit in a loop": "{% set s = 'a' * 30000 %}{% set b = 'ab' ~ 'a' * 15000 %}{% for i in range(9999) %}{% set z = s.rsplit(b, 1) %}{% endfor %}",
        "replace in a loop": LETTERS + "{% for i in range(99999) %}{% set z = s.replace('b', 'c') %}{% endfor %}",
        "count in a loop": LETTERS + "{% for i in range(99999) %}{% set z = s.count('aab') %}{% endfor %}",
        "find in a loop": "{% set s = 'a' * 2400 %}{% set b = 'a' * 1200 ~ 'b' %}{% for i in range(99999) %}{% for j in range(99999) %}{{ s.find(b) }}{% endfor %}{% endfor %}",
        "striptags": "{% set z = ('<' * 9000000) | striptags %}",
        "striptags of comments": "{% set z = ('<!--' * 3000000) | striptags %}",
        "urlize": "{% set z = ('((((' * 2000000 ~ 'a.com') | urlize %}",
        "urlize of mails": "{% set z = ('a@' * 3000000) | urlize %}",
        "urlize of brackets": "{% set z = ('<' * 9000000) | urlize %}",
        "wordwrap": "{% set z = ('a' * 9000000) | wordwrap(1) %}",
        "wordcount": "{% set z = ('a ' * 9000000) | wordcount * (99999 ** (99999 ** 99)) %}",
        "title": "{% set z = ('a' * 9000000 ~ ' ') | title %}" * 30,
        "truncate": "{% set z = ('a ' * 9000000) | truncate(8000000) %}" * 30,
        "indent": "{% set z = ('\n' * 900000) | indent(9999, blank=true) %}",
        "indent by a text": "{% set z = ('a\n' * 900000) | indent('x' * 9999) %}",
        "indent of other breaks": "{% set z = ('a\u2028\x1c' * 900000) | indent(9999) %}",
        "join": LETTERS + "{% set z = s.join(range(99999) | map('string')) %}",
        "join filter": LETTERS + "{% set z = range(99999) | join(s) %}", "join of a text": LETTERS + "{% set z = s | join(s) %}",
        "replace": LETTERS + "{% set z = s.replace('a', s) %}", "replace of nothing": LETTERS + "{% set z = s.replace('', s) %}",
        "replace filter": LETTERS + "{% set z = s | replace('a', s) %}",
        "json, indented": "{% set z = ([[[[1]]]] * 99999) | tojson(indent=9999) %}",
        "json, indented deeply": repeat("[n.x]", "0", 800, "{% set z = ([n.x] * 100) | tojson(indent=64) %}"),
        "json, indented by a text": "{% set z = ([1] * 99999) | tojson(indent='x' * 9999) %}",
        "json, separated": "{% set z = ([1] * 99999) | tojson(separators=('x' * 9999, ':')) %}",
        "json, keys separated": "{% set z = ([{'a': 1}] * 99999) | tojson(separators=(',', ':' * 9999)) %}",
        "json of controls": "{% set z = ('\x01' * 9000000) | tojson %}{% set y = z | tojson %}{% set x = [y] * 99 | tojson %}",
        "wrapped": "{% set z = ('a b ' * 900000) | wordwrap(3, wrapstring='x' * 9999) %}",
        "xmlattr": "{% set z = {'a': 'b' * 9000000} | xmlattr * 99 %}{{ z * 99 }}",
        "sum of lists": "{% set z = ([[1] * 999] * 9999) | sum(start=[]) %}",
        "sum of texts": "{% set z = (['x' * 999] * 99999) | sum(start='') %}",
    },
    "dates": {
        **{f: "{% set z = strftime_now('" + f + "') %}" for f in ("%999999999d", "%0999999999d", "%_999999999Y", "%-999999999m", "%^999999999B", "%#999999999A", "%E999999999Y", "%O999999999d", "%+999999999Y", "%999999999%", "%999999999c", "%999999999x",
                                                              "%1999999999n", "%1999999999t", "%99999999999999999999d",
                                                              "%1999999999Z", "%1999999999z", "%1999999999s", "%::1999999999z",
                                                              "%1999999999G")},
        "many": "{% set z = strftime_now('%99Y' * 7000000) %}", "many names": "{% set z = strftime_now('%A' * 9000000) %}",
        "many full dates": "{% set z = strftime_now('%c' * 9000000) %}",
        "in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% set z = strftime_now('%c') %}{% endfor %}{% endfor %}",
        "of a variable": "{% set w = 10 ** 9 %}{{ strftime_now('%' ~ w ~ 'd') }}",
        "mapped": "{% for i in range(99999) %}{% set z = strftime_now('%B' * 49) ~ z %}{% endfor %}{{ z * 9999 }}",
        "long text": "{% set z = strftime_now('x' * 300000000) %}", "nothing": "{% set z = strftime_now('%p' * 90000000) %}",
    },
    "bytes": {
        "product": "{{ ('a'.encode() * 2000000000) | length }}", "sum": repeat("n.x + n.x", "'xxxxxxxxxxxxxxxx'.encode()", 40),
        "percent": "{% set x = '%1999999999d'.encode() % 1 %}",
        "join": "{% set b = ('x' * 30000000).encode() %}{% set x = b.join([b] * 60) %}",
        "replace": "{% set b = ('x' * 30000).encode() %}{% set x = b.replace('x'.encode(), b) %}",
        "ljust": "{{ 'x'.encode().ljust(1999999999) }}", "zfill": "{{ 'x'.encode().zfill(1999999999) }}",
        "center": "{{ 'x'.encode().center(1999999999) }}", "expandtabs": "{{ '\t'.encode().expandtabs(1999999999) }}",
        "hex": "{% set x = ('x' * 30000000).encode().hex('-', 1) * 9 %}",
        "utf-32": "{% set x = ('x' * 30000000).encode('utf-32') %}{% set y = x + x %}",
        "utf-7": "{% set x = ('ä,' * 9000000).encode('utf-7') * 9 %}",
        "xmlcharrefreplace": "{% set x = ('\U0001f600' * 9000000).encode('ascii', 'xmlcharrefreplace') * 9 %}",
        "namereplace": "{% set x = ('\U0001f600' * 900000).encode('ascii', 'namereplace') * 99 %}",
        "decode": "{% set x = ('x' * 30000000).encode().decode('utf-16') * 99 %}",
        "idna": "{% set x = ('ä' * 30000).encode('idna') %}{{ x * 99999999 }}",
        "punycode": "{% set x = ('äb' * 300000).encode('punycode') %}",
        "repr": "{% set x = ('\x01' * 30000000).encode() | string %}{% set y = x ~ x %}",
        "split": "{% set x = (',' * 30000000).encode().split(','.encode()) %}",
        "list": "{% set x = ('x' * 30000000).encode() | list %}{% set y = x + x %}",
        "int from bytes": "{% set x = (1).from_bytes(('x' * 30000000).encode(), 'big') %}{{ x // 3 ** 9999999 }}",
        "maketrans": "{% set x = ('x' * 9000000).translate('x'.maketrans({'x': 'y' * 99})) %}",
        "rfind": "{% set s = ('a' * 1000000).encode() %}{% set b = ('ab' ~ 'a' * 500000).encode() %}{{ s.rfind(b) }}",
    },
    "sources": {
        "outputs": "{{a}}" * 190000, "letters": "x" * 5_000_000, "names": "{{ " + "a," * 400000 + " }}",
        "variables": "".join("{%% set a%d = 1 %%}" % i for i in range(50000)), "numbers": "{{ " + "1," * 400000 + " }}",
        "additions": "{{ " + "a+" * 400000 + "a }}", "concatenations": "{{ " + "a~" * 400000 + "a }}",
        "attributes": "{{ a" + ".b" * 400000 + " }}", "filters": "{{ a" + "|e" * 400000 + " }}",
        "indexes": "{{ a" + "[0]" * 300000 + " }}", "calls": "{{ a" + "()" * 400000 + " }}",
        "parentheses": "{{ " + "(" * 400000 + ")" * 400000 + " }}", "brackets": "{{ " + "[" * 400000 + "]" * 400000 + " }}",
        "braces": "{{ " + "{1:" * 200000 + "}" * 200000 + " }}",
        "few parentheses": "{{ " + "(" * 150 + "a" + ")" * 150 + " }}{{ f() }}", "not": "{{ " + "not " * 200000 + "a }}",
        "minus": "{{ " + "- " * 400000 + "a }}", "else": "{{ " + "a if b else " * 60000 + "c }}",
        "power": "{{ " + "a**" * 300000 + "a }}", "comparisons": "{{ " + "a<" * 300000 + "a }}",
        "tests": "{{ a" + " is none" * 90000 + " }}", "and": "{{ " + "a and " * 150000 + "a }}",
        "ifs": "{% if a %}" * 90000, "ifs, closed": "{% if a %}" * 40000 + "{% endif %}" * 40000,
        "fors": "{% for a in b %}" * 30 + "{% endfor %}" * 30, "fors, many": "{% for a in b %}" * 30000 + "{% endfor %}" * 30000,
        "macros": "{% macro a() %}" * 30000 + "{% endmacro %}" * 30000,
        "blocks": "".join("{%% block a%d %%}" % i for i in range(20000)) + "{% endblock %}" * 20000,
        "blocks in a row": "".join("{%% block a%d scoped %%}{%% set b%d = 1 %%}{%% endblock %%}" % (i, i) for i in range(15000)),
        "withs": "{% with a=1 %}" * 30000 + "{% endwith %}" * 30000,
        "filter blocks": "{% filter upper %}" * 25000 + "{% endfilter %}" * 25000, "raw": "{% raw %}" * 100000,
        "comments": "{#" * 400000, "comments, closed": "{# a #}" * 120000 + "{{ f() }}", "quotes": "{{ '" * 200000,
        "a long text": "{{ '" + "\\" * 900000 + "' }}{{ f() }}", "a long number": "{{ " + "9" * 900000 + " }}",
        "a long hexadecimal number": "{{ 0x" + "f" * 900000 + " }}", "a long name": "{{ " + "a" * 900000 + "() }}",
        "spaces": "{{" + " " * 900000 + "f() }}", "lines": "\n" * 900000 + "{{ f() }}",
        "includes": "".join("{%% set a%d = 1 %%}{%% include 'x' ignore missing %%}" % i for i in range(12000)),
        "imports": "".join("{%% set a%d = 1 %%}{%% import 'x' as b%d with context %%}" % (i, i) for i in range(10000)),
        "sets": "{% set " + "a," * 200000 + "b = c %}", "arguments": "{{ f(" + "a," * 200000 + ") }}",
        "keywords": "{{ f(" + ",".join(f"a{i}=1" for i in range(60000)) + ") }}",
        "a macro's arguments": "{% macro f(" + ",".join(f"a{i}=1" for i in range(60000)) + ") %}{% endmacro %}{{ f() }}{{ g() }}",
        "names of loops": "".join("{%% for a%d in b %%}{%% endfor %%}" % i for i in range(22000)),
        "ifs that set": "".join("{%% if a %%}{%% set b%d = 1 %%}{%% endif %%}" % i for i in range(22000)),
        "nulls": "\0" * 900000 + "{{ f() }}", "surrogates": "\ud800" * 900000 + "{{ f() }}",
        "chains of else": "{% if a %}" + "{% elif a %}" * 60000 + "{% endif %}",
        "a name as wide as a page": "{{ " + "ä" * 400000 + "() }}", "texts side by side": "{{ " + "'a' " * 200000 + "() }}",
    },
    "escapes": {
        "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}", "globals": "{{ raise_exception.__globals__.x.y }}",
        "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
        "namespace": "{{ namespace.__init__.__globals__.sys.exit() }}",
        "joiner": "{{ joiner.__init__.__globals__['os'].system('true') }}",
        "format attribute": "{{ '{0.__class__.x}'.format(messages) | int // 0 }}",
        "format_map attribute": "{{ '{a.__class__}'.format_map({'a': 1}) | int // 0 }}",
        "stored format": "{% set f = '{0.__class__}'.format %}{{ f(1).x.y }}",
        "attr filter": "{{ (messages | attr('__class__')).x }}",
        "map attribute": "{{ (messages | map(attribute='__class__') | list)[0].x.y.z }}", "clear": "{{ messages.clear() }}",
        "update": "{{ messages[0].update({}) }}", "insert": "{{ messages.insert(0, 1) }}", "sort": "{{ messages.sort() }}",
        "setdefault": "{{ messages[0].setdefault('a', 1) }}", "self": "{{ self.__init__.__globals__.x }}",
        "loop": "{% for i in [1] %}{{ loop.__class__.__init__.x() }}{% endfor %}",
        "generator": "{{ (messages | map('string')).gi_frame.f_globals }}",
        "macro": "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__.x }}", "context": "{{ context.x.y }}",
        "environment": "{{ environment.x.y }}", "spend": "{{ (-1000000000) | _spend }}{{ f() }}",
        "spend, mapped": "{{ [-1000000000] | map('_spend') | list }}{{ f() }}",
        "own budget": "{{ [-1000000000000] | map('_spend') | list }}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "underscore in a namespace": "{% set n = namespace(_x=1) %}",
        "underscore set": "{% set n = namespace() %}{% set n.__class__ = 1 %}", "include": "{% include '/etc/passwd' %}",
        "import": "{% import 'os' as os %}", "from": "{% from 'os' import system %}", "extends": "{% extends '/etc/passwd' %}",
        "include a list": "{% include ['a', 'b'] %}", "call a number": "{{ (1)() }}", "call a text": "{{ 'a'() }}",
        "filter by attribute": "{{ [1] | map(attribute='real.__class__.x.y') | list | first }}{{ f() }}",
    },
    "errors": {
        "undefined function": "{{ no_such_function() }}", "undefined attribute": "{{ a.b.c }}",
        "unknown filter": "{{ 'a' | no_such_filter }}",
        "unknown filter in if": "{% if false %}{{ 'a' | no_such_filter }}{% endif %}{{ 'a' | no_such_filter }}",
        "unknown test": "{{ 1 is no_such_test }}", "unknown tag": "{% no_such_tag %}",
        "unknown method": "{{ 'a'.no_such_method() }}", "types": "{{ 'a' + 1 }}", "none": "{{ 'a' + none }}",
        "not iterable": "{% for x in none %}{% endfor %}", "zero": "{{ 1 / 0 }}", "overflow": "{{ 10.0 ** 1000 }}",
        "infinite int": "{{ (1e308 * 10) | int // 0 }}",
        "huge range": "{% for i in range(10 ** 9) %}{% endfor %}", "negative root": "{{ (-1) ** 0.5 < 1 }}",
        "unhashable": "{{ {}[[]] // 1 }}{{ {[]: 1} }}", "unsortable": "{{ [1, 'a'] | sort }}",
        "json of a macro": "{% macro f() %}{% endmacro %}{{ f | tojson }}", "json of undefined": "{{ x | tojson }}",
        "bad format": "{{ '%d' % 'a' }}", "bad format method": "{{ '{'.format(1) }}", "index": "{{ [1].index(2) }}",
        "unpack": "{% set a, b = [1] %}", "argument": "{% macro f(a) %}{% endmacro %}{{ f(1, 2, 3) }}",
        "keyword": "{{ namespace(1, 2, 3) }}",
        "surrogate date": "{{ strftime_now('\ud800') }}", "date of a number": "{{ strftime_now(1) }}",
        "refusal": "{{ raise_exception('no') }}", "refusal with all": "{{ raise_exception('x' * 10 ** 7) }}",
        "join of numbers": "{{ ','.join([1]) }}", "split of nothing": "{{ 'a'.split('') }}", "too many": "{{ 'a'.strip(1, 2, 3) }}",
        "wrong kind": "{{ 'a'.split(1) }}", "pop": "{{ [].pop() }}", "stop": "{{ [].__iter__().__next__() }}",
        "cycle of nothing": "{% for i in [1] %}{{ loop.cycle() }}{% endfor %}",
        "recursive": "{% for i in [1] %}{{ loop(1) }}{% endfor %}", "break outside": "{% break %}",
        "caller": "{{ caller() }}", "super": "{{ super() }}", "assign": "{% set messages.x = 1 %}",
        "round": "{{ 1 | round(1, 'other') }}", "long key": "{{ ({} | attr('x' * 10 ** 6)).y }}",
        "a message of megabytes": "{{ {}['x' * 10 ** 7].y }}", "int of a long text": "{{ '%d' % ('9' * 5000) }}",
    },
}
# These end by themselves, in time, where Python or the C library happens to be careful; the others must be refused.
MAY_END = {
    "numbers": {"decimal int", "int base 7", "as_integer_ratio"}, "growing": {"escape"}, "many values": {"closures"},
    "loops": {"compared texts", "searched text"}, "products of lengths": {"striptags", "striptags of comments", "urlize of mails", "find in a loop"},
    "bytes": {"punycode"}, "dates": {*KINDS["dates"]} - {"in a loop"},
}


def attempt(source: str) -> tuple[str, float, int]:
    """What comes of a template, in this process: (text or kind of error, seconds, MiB of the helper)."""
    from pyengine.chat import template

    started = time.monotonic()
    try:
        said = "text " + template.ChatTemplate(source).render([{"role": "user", "content": "hi", "width": 1999999999}])[:40]
    except BaseException as error:
        said = f"{type(error).__module__}.{type(error).__name__}: {error}"[:300]
    return said, time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10


def resident() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) >> 10 for line in f if line.startswith("VmHWM"))


def attacked(source: str) -> list[object]:
    """The same in a process of its own, with an alarm and a limit of memory: [text, seconds, MiB here, MiB of the helper]."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        signal.alarm(int(4 * SECONDS) + 10)
        with open("/proc/self/statm") as f:
            limit = int(f.read().split()[0]) * resource.getpagesize() + (MIB << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        before = resident()
        said, seconds, helper = attempt(source)
        os.write(writer, json.dumps([said, round(seconds, 2), resident() - before, helper]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as f:
        data = f.read()
    status = os.waitpid(pid, 0)[1]
    return json.loads(data) if data else [f"ended by signal {status & 127}" if status & 127 else f"exit {status >> 8}", 0.0, 0, 0]


def main(kind: str, *names: str) -> None:
    from pyengine.chat import budget, helper, template

    helper.MAX_SECONDS, budget.MAX_SECONDS_HERE = SECONDS, SECONDS / 4
    template.ChatTemplate("{{ messages | length }}").render([])                 # what is imported once
    for name in names or KINDS[kind]:
        print(json.dumps([name, *attacked(KINDS[kind][name])]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
