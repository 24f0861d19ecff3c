"""The readers, each with right inputs and its own way to damage them. Imports of pyengine stand in functions, so that atheris sees them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import corpus
from mutators import spoilt_bytes, spoilt_json, spoilt_text

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "n_batch": 16}
SMALL = 256 << 20                                            # bytes of a plan that is carried out


class Target:
    """A reader.

    seconds  of the processor that an input may take
    right    the seeds are: none is refused
    """

    name: ClassVar[str]
    seconds: ClassVar[float] = 5.0
    words: ClassVar[Sequence[bytes]] = ()
    right: ClassVar[bool] = True

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())

    @cached_property
    def seeds(self) -> list[bytes]:
        """Right inputs; a few."""
        raise NotImplementedError

    def spoilt(self, rng: Random, data: bytes) -> bytes:
        return spoilt_bytes(rng, data, self.seeds, self.words)

    def run(self, data: bytes) -> None:
        """Raises PyEngineError, or nothing."""
        raise NotImplementedError


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Go on behind what may be refused."""
    from pyengine.errors import PyEngineError

    with contextlib.suppress(PyEngineError):
        yield


def made(folder: Path, spec: corpus.Spec) -> Path:
    """A file with a tiny model."""
    path = folder / "model.gguf"
    path.write_bytes(spec.write())
    return path


class Gguf(Target):
    """A model's file: its header, every value, the tokenizer, the plan, and the model itself if it is small."""

    name = "gguf"

    @cached_property
    def specs(self) -> list[corpus.Spec]:
        return corpus.model_specs()

    @cached_property
    def seeds(self) -> list[bytes]:
        return [s.write() for s in self.specs]

    def spoilt(self, rng: Random, data: bytes) -> bytes:
        if rng.random() < 0.2:                               # headers are a small part of the file
            head = min(len(data), 20_000)
            return spoilt_bytes(rng, data[:head], self.seeds) + data[head:]
        return corpus.spoilt_spec(rng, rng.choice(self.specs)).write()

    def run(self, data: bytes) -> None:
        import pyengine as pe

        path = self.folder / "model.gguf"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        with refusals(), pe.GGUFFile(path) as file:
            for key in file.metadata:
                with refusals():
                    file.metadata[key], file.metadata.type_name(key), file.metadata.count(key), file.metadata.encoded(key)
                    file.metadata.raw(key)
            for name in file.tensors:
                with refusals():
                    file.view(name)
                    file.array(name)
        tokens(path)
        plan = pe.plan(path, **SETTINGS)
        plan.table()
        if plan.total < SMALL:
            model = pe.load(path, **SETTINGS)
            for ask in (lambda: model.logits([1, 2, 3]), lambda: model.generate("hello", max_tokens=2), lambda: model.sampling_defaults,
                        lambda: model.chat([{"role": "user", "content": "hello"}], max_tokens=2)):
                with refusals():
                    ask()


def tokens(path: Path) -> None:
    """Use a file's vocabulary."""
    import pyengine as pe

    with refusals():
        t = pe.load_tokenizer(path)
        for text in ("hello to é", "\0<s>\ud800 \u2581🙂</s>", "<|user|>", " a" * 200):
            with refusals():
                ids = t.tokenize(text)
                t.detokenize(ids)
                decoder = t.decoder(skip_special=True)
                for i in ids:
                    decoder.push(i)
        for ids in ([0, 1, 2], [2**31], [-1], [True], [t.vocab_size]):
            with refusals():
                t.detokenize(ids)


class Vocabulary(Gguf):
    """A file of a vocabulary alone, of each kind."""

    name = "vocabulary"

    @cached_property
    def specs(self) -> list[corpus.Spec]:
        return corpus.vocabulary_specs()

    def run(self, data: bytes) -> None:
        path = self.folder / "vocabulary.gguf"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        tokens(path)


class Session(Target):
    """A saved conversation; mostly with sums that fit what was changed."""

    name = "session"

    @cached_property
    def model(self) -> Any:
        import pyengine as pe

        return pe.load(made(self.folder, corpus.model_specs()[2]), **SETTINGS)

    @cached_property
    def seeds(self) -> list[bytes]:
        from pyengine.cache import sessions

        notes = json.dumps({"format": "pyengine-run talk 1", "raw": False, "system": None, "turns": [{"role": "user", "content": "hello"}]}).encode()
        out, own = [], sessions._sections
        try:
            for n, said in ((1, b""), (40, notes)):
                self.model.reset()
                answer = self.model.generate([5 + i for i in range(n)], max_tokens=2, temperature=0)
                sessions._sections = lambda *args: self._kept(own(*args))
                self._lengths: list[int] = []
                self.model.save(self.folder / "saved", answer, notes=said)
                out.append(self._packed_lengths() + (self.folder / "saved").read_bytes())
        finally:
            sessions._sections = own
        return out

    def _kept(self, sections: Iterator[Any]) -> Iterator[Any]:
        for section in sections:
            self._lengths.append(memoryview(section).nbytes)
            yield section

    def _packed_lengths(self) -> bytes:
        return bytes([len(self._lengths)]) + b"".join(n.to_bytes(4, "little") for n in self._lengths)

    @staticmethod
    def parts(data: bytes) -> tuple[list[int], bytes]:
        """An input: lengths of the sections as they were, and the file."""
        n = data[0] if data else 0
        return [int.from_bytes(data[1 + 4 * i : 5 + 4 * i], "little") for i in range(n)], data[1 + 4 * n :]

    def spoilt(self, rng: Random, data: bytes) -> bytes:
        lengths, file = self.parts(data)
        head = data[: len(data) - len(file)]
        if rng.random() < 0.3 or not lengths:
            return head + spoilt_bytes(rng, file, [self.parts(s)[1] for s in self.seeds])
        at, sections = 0, []
        for n in lengths:
            sections.append(file[at + 32 : at + 32 + n])
            at += 32 + n
        for _ in range(rng.randrange(1, 3)):
            i = min(rng.randrange(len(sections)), rng.randrange(len(sections)))      # mostly the first ones
            section = spoilt_bytes(rng, sections[i])
            sections[i] = section if rng.random() < 0.3 else (section + bytes(len(sections[i])))[: len(sections[i])]
        return head + b"".join(sha256(s).digest() + s for s in sections)

    def run(self, data: bytes) -> None:
        from pyengine.cache import sessions
        from pyengine.cli.talk import saved as talks

        path = self.folder / "session"
        path.write_bytes(self.parts(data)[1])
        self.model.reset()
        with refusals():
            talks.unpack(path, sessions.read_notes(path))
        self.model.restore(path)
        held = self.model._runner.cells.conversations[-1]
        beginning = [key if isinstance(key, int) else 7 for key in held.keys]
        self.model.generate([*beginning, 9][-60:], max_tokens=2, temperature=0)


class Picture(Target):
    """A picture's file, also as a data URL."""

    name = "picture"

    @cached_property
    def seeds(self) -> list[bytes]:
        return list(corpus.pictures())

    def run(self, data: bytes) -> None:
        import base64

        import pyengine as pe

        url = len(data) % 7 == 0
        pe.open_image("data:image/png;base64," + base64.b64encode(data).decode() if url else data).pixels.sum()


class Template(Target):
    """A chat template; a damaged one gets less time than others, so that more are tried."""

    name = "template"
    seconds = 4.0
    texts = (corpus.TEMPLATE,
             "{%- if messages[0]['role'] == 'system' %}{%- set loop_messages = messages[1:] %}{{- messages[0].content | trim }}{%- else %}"
             "{%- set loop_messages = messages %}{%- endif %}{%- for message in loop_messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('roles must alternate') }}{%- endif %}{{ '<s>' ~ message.role ~ '\\n' + message.content | replace('a', 'b') + eos_token }}{%- endfor %}",
             "{% macro part(p, n=1) -%}{{ p.text | upper if p is mapping else p | string | indent(n) }}{%- endmacro %}{% set ns = namespace(x=0, y=[]) %}"
             "{% for m in messages %}{% set ns.x = ns.x + loop.length %}{% if m.content is string %}{{ part(m.content) }}{% else %}{% for p in m.content %}"
             "{{ part(p) }}{% endfor %}{% endif %}{% if m.tool_calls %}{{ m.tool_calls | tojson(indent=2) }}{% endif %}{% endfor %}{{ ns.x }}",
             "{% for k, v in messages[0].items() | sort %}{{ k ~ '=' ~ v }}{% endfor %}{{ '%s-%5d' | format('a', 3) }}{{ 'x{:>4}'.format(2) }}"
             "{{ [1, 2, 3] | map('string') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ strftime_now('%Y') }}")
    words = ("{{", "}}", "{%", "%}", "{%-", "-%}", "{% for x in ", "{% endfor %}", "{% if ", "{% endif %}", "{% set x = ", "{% macro f(x) %}", "{% endmacro %}",
             "{% call f() %}", "{% filter ", "{% endset %}", " | ", " ~ ", " * ", " ** ", " // ", " % ", " is ", " in ", " not ", " and ", "[", "]", "(", ")", "{", "}", ",",
             ":", ".", "99999999", "9" * 40, "1e308", "'a'", "'%99999999d'", "'{:99999999}'", "messages", "loop", "namespace()", "range(9999999)", "cycler(1)",
             "joiner()", "dict(a=1)", "lipsum(9)", "tojson", "replace('a', 'aaaaaaaa')", "join", "indent(9999)", "center(9999999)", "round(99999)", "batch(3)",
             "slice(99999)", "sort", "unique", "groupby('role')", "map(", "select(", "attr('__class__')", ".__class__.__mro__", "['__globals__']", "recursive",
             "{% include 'x' %}", "{% extends x %}", "{% block a %}", "{# ", " #}", "{% raw %}", "{% break %}", "{% continue %}", "{% generation %}", "caller()",
             "self", "super()", "true", "none", "x.y", "-", "+", "xmlattr", "urlize", "wordwrap(1)", "truncate(0)", "format(1)", "pprint", "random", "sum(start='')",
             "dictsort", "items", "forceescape", "striptags", "filesizeformat", "int(0, 99)", "float", "list", "string", "first", "last", "max", "min", "tojson(indent=99)")
    messages = [{"role": "user", "content": "hello a"}, {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                {"role": "user", "content": [{"type": "text", "text": "b"}, "c"]}]

    @cached_property
    def seeds(self) -> list[bytes]:
        return [t.encode() for t in self.texts]

    def spoilt(self, rng: Random, data: bytes) -> bytes:
        return spoilt_text(rng, data.decode("utf-8", "replace"), self.words).encode("utf-8", "surrogatepass")

    def run(self, data: bytes) -> None:
        from pyengine.chat import helper
        from pyengine.chat.template import ChatTemplate

        helper.MAX_SECONDS = 5.0 if data in self.seeds else 1.5
        template = ChatTemplate(data.decode("utf-8", "surrogatepass" if data.isascii() else "replace"), "<s>", "</s>")
        with refusals():
            template.render(self.messages[:1])
        template.render(self.messages, media_marker="<>")


class Json(Target):
    """Inputs are one JSON value; sometimes its text is damaged too."""

    value: ClassVar[Any]

    @cached_property
    def seeds(self) -> list[bytes]:
        return [corpus.as_json(self.value)]

    def spoilt(self, rng: Random, data: bytes) -> bytes:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = self.value
        if rng.random() < 0.1:                               # a file of which the text is none
            value = dict(self.value)
            name = rng.choice(list(value))
            text = corpus.as_json(value[name])
            value[name] = {"raw": rng.choice((spoilt_bytes(rng, text), b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, text[:-1])).decode("latin-1")}
            return corpus.as_json(value)
        part = rng.choice(list(value)) if isinstance(value, dict) and value else None
        if part is None:
            return corpus.as_json(spoilt_json(rng, value))
        return corpus.as_json({**value, part: spoilt_json(rng, value[part])})

    @staticmethod
    def file(value: Any) -> bytes:
        if isinstance(value, dict) and set(value) == {"raw"} and isinstance(value["raw"], str):
            return value["raw"].encode("latin-1", "replace")
        return corpus.as_json(value)


class Checkpoint(Json):
    """A folder in Hugging Face's form, and its conversion: configs, tokenizer, safetensors header."""

    name = "checkpoint"
    seconds = 8.0
    value = corpus.checkpoint()

    def run(self, data: bytes) -> None:
        from converters import convert

        value = json.loads(data)
        folder = self.folder / "hf"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, content in value.items() if isinstance(value, dict) else ():
            raw = self.file(content)
            if name == "safetensors":
                raw = len(raw).to_bytes(8, "little") + raw + bytes(40_000)
                name = "model.safetensors"
            if name in self.value or name == "model.safetensors":
                (folder / name).write_bytes(raw)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            convert(folder, self.folder / "out.gguf")


class Store(Json):
    """Ollama's manifest and the small files beside a model."""

    name = "store"
    value = corpus.store()

    @cached_property
    def model(self) -> bytes:
        return corpus.model_specs()[0].write()

    def run(self, data: bytes) -> None:
        from pyengine.engine.language import Language
        from pyengine.files import stores
        from pyengine.files.model_files import open_files
        from pyengine.text.sampling import SamplingParams

        value = json.loads(data)
        os.environ.update(OLLAMA_MODELS=str(self.folder / "ollama"), PYENGINE_MODELS="", HF_HUB_CACHE=str(self.folder / "none"), HOME=str(self.folder))
        manifest = self.folder / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
        blobs = self.folder / "ollama" / "blobs"
        for folder in (manifest.parent, blobs):
            folder.mkdir(parents=True, exist_ok=True)
        value = value if isinstance(value, dict) else {}
        manifest.write_bytes(self.file(value.get("manifest")))
        for i, kind in enumerate(("model", "template", "system", "params", "messages", "license"), 1):
            content = value.get(kind, "")
            raw = self.model if kind == "model" else content.encode("utf-8", "surrogatepass") if isinstance(content, str) else self.file(content)
            (blobs / f"sha256-{f'{i:x}' * 64}").write_bytes(raw)
        stores.list_models()
        files = open_files("tiny")
        said = Language(files.model.metadata, files.modelfile)
        with refusals():
            SamplingParams(**said.sampling_defaults)
        with refusals():
            said.stop_defaults
        with refusals():
            said.template.render(said.begun([{"role": "user", "content": "hello"}]))


def _targets() -> dict[str, type[Target]]:
    from arguments import Arguments
    from service import Service

    return {t.name: t for t in (Gguf, Vocabulary, Session, Picture, Template, Arguments, Checkpoint, Store, Service)}


TARGETS = _targets()
