"""What a file says of the texts that vectors are made of: prompts that stand before them, by name, and where they are cut.

Keys "<arch>.embedding.*", which our converter writes from sentence-transformers' files (Reimers & Gurevych 2019, arXiv:1908.10084).
"""

from __future__ import annotations

from collections.abc import Mapping

from pyengine.errors import InvalidModelError, RequestError, shown
from pyengine.files.hparams import Hparams
from pyengine.records import NamedTuple


class Prefixes(NamedTuple):
    """Prompts by name; the name of the one that is used where none is asked for; the most tokens of a text, 0: no bound but the model's."""

    texts: Mapping[str, str] = {}
    default: str | None = None
    max_tokens: int = 0

    @classmethod
    def read(cls, h: Hparams) -> Prefixes:
        """Read a file's keys. Raises: InvalidModelError."""
        names, texts = h.get("embedding.prompts.names", [], list), h.get("embedding.prompts.texts", [], list)
        default, most = h.get("embedding.prompts.default", None, str), h.get("embedding.max_tokens", 0, int)
        if len(names) != len(texts) or not all(isinstance(text, str) for text in (*names, *texts)):
            raise InvalidModelError(f"{h.key('embedding.prompts.names')} and embedding.prompts.texts are not as many texts each")
        if default is not None and default not in names or most < 0:
            raise InvalidModelError(f"{h.key('embedding.prompts.default')} is {default!r}, embedding.max_tokens {most}: a name of a prompt, "
                                    "and a number from 0 on, are needed")
        return cls(dict(zip(names, texts)), default, most)

    def before(self, prompt: str | None) -> str:
        """Return what stands before a text: the prompt of this name; "": nothing; None: the file's default. Raises: RequestError."""
        if isinstance(prompt, str) and not prompt:
            return ""
        if prompt is not None and (not isinstance(prompt, str) or prompt not in self.texts):
            raise RequestError(f"prompt must be the name of one of the file's prompts, {', '.join(map(repr, self.texts)) or 'of which there are none'}, "
                               f"got {shown(prompt)}")
        name = self.default if prompt is None else prompt
        return self.texts[name] if name is not None else ""
