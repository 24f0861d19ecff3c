"""What a model's files say about text: the tokenizer, the chat template, settings, each read when it is first needed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TYPE_CHECKING

from pyengine.arguments import switch, takes
from pyengine.errors import InvalidModelError, ModelWarning, shown
from pyengine.files.gguf import Metadata
from pyengine.files.hparams import Hparams
from pyengine.files.stores import Modelfile
from pyengine.text.prefixes import Prefixes
from pyengine.text.sampling import ollama_sampling, sampling_defaults
from pyengine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pyengine.chat.reply.style import Style
    from pyengine.chat.template import ChatTemplate
    from pyengine.text.grammar import Grammars


class Language:
    """The tokenizer and template of one file's metadata, and what Ollama's Modelfile says beside it."""

    def __init__(self, metadata: Metadata, modelfile: Modelfile = Modelfile()):
        self.metadata, self.modelfile = metadata, modelfile

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer."""
        return Tokenizer.from_metadata(self.metadata)

    @cached_property
    def prefixes(self) -> Prefixes:
        """What the file says of texts that vectors are made of."""
        return Prefixes.read(Hparams(self.metadata))

    @cached_property
    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the model's authors recommend, the Modelfile's before the file's."""
        return {**sampling_defaults(self.metadata), **ollama_sampling(self.modelfile.parameters)}

    @property
    def stop_defaults(self) -> tuple[str, ...]:
        """Texts that end an answer of which the request says nothing."""
        stop = self.modelfile.parameters.get("stop") or ()
        stop = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) for s in stop):
            raise InvalidModelError(f"Ollama's parameter 'stop' is {shown(stop)}, which is no text or list of texts")
        return tuple(s for s in stop if s)

    @property
    def system_default(self) -> str:
        """The system text of conversations that have none of their own; "" if there is none."""
        return self.modelfile.system

    def begun(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return a conversation after the Modelfile's system text, if it has none of its own, and the Modelfile's messages."""
        system, whole = self.modelfile.system, [*self.modelfile.messages, *messages]
        own = any(isinstance(m, Mapping) and isinstance(role := m.get("role"), str) and role in ("system", "developer") for m in whole)
        return [{"role": "system", "content": system}, *whole] if system and not own else whole

    @cached_property
    def template(self) -> ChatTemplate:
        """The file's chat template, or a default for its kind of vocabulary."""
        from pyengine.chat.template import ChatTemplate                        # jinja2 takes 25 ms to import

        template = ChatTemplate.from_metadata(self.metadata, self.tokenizer)
        self._compare(template.source)
        return template

    @cached_property
    def style(self) -> Style:
        """How the model writes thinking and calls of tools, by its template."""
        from pyengine.chat.reply.style import find

        return find(self.template.source, lambda text: self.tokenizer.id_of(text) is not None)

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars for its tokenizer."""
        from pyengine.text.grammar import Grammars

        return Grammars(self.tokenizer, self.marks)

    @property
    def marks(self) -> list[int]:
        """Ids of the tokens that stand for themselves in replies."""
        return [i for i in map(self.tokenizer.id_of, self.style.marks) if i is not None]

    def _compare(self, source: str) -> None:
        """Warn where the Modelfile's template, which is in Go's syntax and not read, has other special tokens than the one that is used.

        Ollama's library writes the authors' template once more in that syntax, so mostly they are the same, or fewer.
        """
        if not self.modelfile.template:
            return
        theirs, ours = ({i for i in self.tokenizer.tokenize(text, add_special=False) if i in self.tokenizer.special_ids}
                        for text in (self.modelfile.template, source))
        if theirs - ours or ours and not theirs:
            warnings.warn("the model's TEMPLATE in Ollama is of another form than its file's own chat template, which is used instead: "
                          "templates in Go's syntax are not read", ModelWarning)


class ReadsText:
    """What every model that has a tokenizer offers; its `Language` is in `_language`."""

    _language: Language

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built from the file when it is first needed."""
        return self._language.tokenizer

    @takes()
    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Return the token ids of a text; `add_special` adds those that the model wants around it. Raises: RequestError."""
        return self.tokenizer.tokenize(text, add_special=switch("add_special", add_special))

    @takes()
    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Raises: RequestError for what is no list of the vocabulary's ids."""
        return self.tokenizer.detokenize(ids)

    @property
    def prefixes(self) -> Prefixes:
        """What its file puts before texts of which vectors are made, by names."""
        return self._language.prefixes
