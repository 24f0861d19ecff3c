"""What a model's files say about text: the tokenizer and the chat template, each built when it is first needed."""

from __future__ import annotations

from functools import cached_property
from typing import Any, TYPE_CHECKING

from pyengine.files.gguf import Metadata
from pyengine.text.sampling import sampling_defaults
from pyengine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pyengine.chat.template import ChatTemplate


class Language:
    """The tokenizer and template of one file's metadata."""

    def __init__(self, metadata: Metadata):
        self.metadata = metadata

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer."""
        return Tokenizer.from_metadata(self.metadata)

    @cached_property
    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the model's authors recommend."""
        return sampling_defaults(self.metadata)

    @property
    def stop_defaults(self) -> tuple[str, ...]:
        """Texts that end an answer of which the request says nothing."""
        return ()

    @cached_property
    def template(self) -> ChatTemplate:
        """The file's chat template, or a default for its kind of vocabulary."""
        from pyengine.chat.template import ChatTemplate                        # jinja2 takes 25 ms to import

        return ChatTemplate.from_metadata(self.metadata, self.tokenizer)
