"""What converters of text encoders share: sizes, and what stands behind the layers: a head of a masked model, a head of classes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from gguf import GGUFWriter, PoolingType

from .checkpoint import Config
from .contract import Entry, layer_norm, linear
from .decoder import Tensors

MASKED, CLASSES = ("ForMaskedLM", "ForPreTraining"), "ForSequenceClassification"


class TextEncoder:
    """A text encoder; a subclass says where its checkpoint has what, and lists its layers.

    Names in the checkpoint, without which there is no such head: masked, (dense, norm, output, bias) of the head of a masked model; classes,
    (dense, output) of that of classes. class_act: what stands between the two.
    """

    arch: str
    renames: Sequence[tuple[str, str]] = ()
    defaults: Mapping[str, Any]
    masked: ClassVar[tuple[str, str, str, str]]
    classes: ClassVar[tuple[str, str]]
    class_act: ClassVar[str] = "tanh"
    also: ClassVar[tuple[str, ...]] = ()                     # tensors that are read by nobody
    head_width = 0                                           # of the masked model's, 0: that of the layers
    biased = True                                            # norms have a bias

    def __init__(self, config: dict[str, Any], file: Path):
        c = self.config = Config(config, self.defaults, file)
        self.vocab_size, self.width, self.d_ff = (c.count(n) for n in ("vocab_size", "hidden_size", "intermediate_size"))
        self.n_layers, self.n_heads, self.n_ctx = (c.count(n) for n in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings"))
        self.eps = c.need("layer_norm_eps")
        name = str((config.get("architectures") or [""])[0])
        self.has_masked, self.has_classes = name.endswith(MASKED), name.endswith(CLASSES)
        self.tied, self.dense_there = bool(c.get("tie_word_embeddings")), True
        self.bias_there = self.masked[3]
        self.labels = self._labels()

    def _labels(self) -> list[str]:
        """Return the names of the classes, as transformers' configs have them."""
        named = self.config.get("id2label")
        if isinstance(named, dict):
            return [str(text) for _, text in sorted((int(i), text) for i, text in named.items())]
        return [f"LABEL_{i}" for i in range(self.config.get("num_labels") or 2)]

    def look(self, names: Collection[str]) -> None:
        """Find out which heads the checkpoint has: some name a class and hold a part of it."""
        dense, _, output, bias = self.masked
        self.has_masked = f"{dense}.weight" in names
        self.has_classes = f"{self.classes[1]}.weight" in names
        self.dense_there = f"{self.classes[0]}.weight" in names
        self.tied = self.tied or f"{output}.weight" not in names
        biases = [bias, f"{output}.bias"] if self.tied else [f"{output}.bias", bias]        # where both are there, the first is read
        self.bias_there = next((name for name in biases if name in names), "")

    @property
    def usual_pooling(self) -> PoolingType:
        """The pooling of a checkpoint beside which nothing says it."""
        return PoolingType.RANK if self.has_classes else PoolingType.MEAN

    def write_keys(self, out: GGUFWriter) -> None:
        out.add_block_count(self.n_layers)
        out.add_context_length(self.n_ctx)
        out.add_embedding_length(self.width)
        out.add_feed_forward_length(self.d_ff)
        out.add_head_count(self.n_heads)
        out.add_layer_norm_eps(self.eps)
        out.add_causal_attention(False)
        if self.has_classes:
            out.add_array(f"{self.arch}.classifier.output_labels", self.labels)
            out.add_string(f"{self.arch}.classifier.activation", self.scores())
            out.add_string(f"{self.arch}.classifier.hidden_act", self.class_act)

    def scores(self) -> str:
        """Return what makes probabilities of the scores: sentence-transformers' word, or what transformers' pipelines do."""
        c = self.config
        own = (c.get("sentence_transformers") or {}).get("activation_fn") or c.get("sbert_ce_default_activation_function")
        if own is not None:
            return {"Sigmoid": "sigmoid", "Softmax": "softmax"}.get(str(own).rpartition(".")[2], "none")
        return "sigmoid" if c.get("problem_type") == "multi_label_classification" or len(self.labels) == 1 else "softmax"

    def unused(self) -> set[str]:
        _, _, output, bias = self.masked
        left = {f"{output}.weight", f"{output}.bias", bias, *self.also}
        return left | {f"{self.classes[0]}.{part}" for part in ("weight", "bias")}

    def heads(self) -> Iterator[Entry]:
        """List what stands behind the layers."""
        d, inner = self.width, self.head_width or self.width
        dense, norm, output, _ = self.masked
        if self.has_masked:
            yield from linear("mlm.dense", dense, inner, d, True)
            yield from layer_norm("mlm.norm", norm, inner)
            if not self.tied:
                yield Entry("mlm.output.weight", f"{output}.weight", (self.vocab_size, inner))
            if self.bias_there:
                yield Entry("mlm.output.bias", self.bias_there, (self.vocab_size,))
        if self.has_classes:
            if self.dense_there:
                yield from linear("cls", self.classes[0], d, d, True)
            yield from linear("cls.output", self.classes[1], len(self.labels), d, True)

    def tensors(self) -> Tensors:
        raise NotImplementedError
