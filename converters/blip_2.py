"""BLIP-2 and InstructBLIP: OPT, Vicuna or Flan-T5 beside a vision transformer and a Q-Former, projectors "blip2" and "instructblip" in GGUF, which
llama.cpp does not have.

Follows transformers `configuration_blip_2.py`, `configuration_instructblip.py`, `processing_blip_2.py`. Names as llama.cpp has them for other Q-Formers; keys
"clip.vision.qformer.*" are ours. Checkpoints from before transformers 4.47 have no token for pictures: nothing else is different.
Axes: V encoder width, F its feed-forward width, Q width of the Q-Former.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config
from .contract import FLOAT32, Entry, converts, layer_norm, linear, supported
from .decoder import Tensors
from .tokenizer import read_vocabulary, Vocabulary
from .vision import feed_forward, image_settings, ONE_INSTRUCTION, square, TextAndEncoder, write_encoder_keys

# transformers' Blip2Config, Blip2VisionConfig, Blip2QFormerConfig and BlipImageProcessorPil where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"num_query_tokens": 32, "vision_config": {}, "qformer_config": {}, "text_config": {}}
VISION: dict[str, Any] = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16, "image_size": 224,
                          "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}
QFORMER: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
                           "layer_norm_eps": 1e-12, "cross_attention_frequency": 2, "use_qformer_text_input": False,
                           "vocab_size": 30522, "max_position_embeddings": 512}
IMAGES: dict[str, Any] = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
                          "size": {"height": 384, "width": 384}}
# text models by their model_type: the class that converts them alone, and its names of tensors by those of the checkpoint
TEXTS = {"opt": ("OPTForCausalLM", ((r"^language_model\.(model\.)?decoder\.", ""), (r"^language_model\.lm_head\.", "lm_head."))),
         "llama": ("LlamaForCausalLM", ((r"^language_model\.(model|lm_head)\.", r"\1."),)),
         "t5": ("T5ForConditionalGeneration", ((r"^language_model\.", ""),))}
READS = "qformer_tokenizer"                     # the folder with the vocabulary by which InstructBLIP's Q-Former reads
# The form of the authors' questions, with answers before them; without a question, a caption. Pictures stand in front. A checkpoint has no
# template of its own.
TEMPLATE = """{%- for m in messages -%}
  {%- if m['role'] not in ['user', 'assistant'] -%}{{ raise_exception('this model knows questions and answers only: give no ' + m['role'] + ' message') }}{%- endif -%}
  {%- set ns = namespace(text='') -%}
  {%- if m['content'] is string -%}{%- set ns.text = m['content'] -%}
  {%- else -%}
    {%- for part in m['content'] if part['type'] == 'text' -%}{%- set ns.text = ns.text + part['text'] -%}{%- endfor -%}
  {%- endif -%}
  {%- set ns.text = ns.text | trim -%}
  {%- if m['role'] == 'assistant' -%}{{ ' ' + ns.text + ('' if ns.text.endswith('.') else '.') + ' ' }}
  {%- elif ns.text.startswith('Question:') -%}{{ ns.text }}
  {%- elif ns.text -%}{{ 'Question: ' + ns.text + ' Answer:' }}
  {%- endif -%}
{%- endfor -%}"""


class Queries:
    """The vision transformer, the Q-Former, and the product into the text model's width. reads: the Q-Former reads the prompt's text too."""

    def __init__(self, root: Config, d_text: int, reads: bool):
        """Read the settings below `root` and of the image processor. Raises: InvalidModelError, UnsupportedModelError."""
        self.root, self.d_text, self.reads = root, d_text, reads
        v = self.vision = Config(root.need("vision_config"), VISION, root.file)
        self.width, self.d_ff, self.n_layers, self.n_heads = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
        self.patch_size, self.image_size = square(v, "patch_size"), square(v, "image_size")
        q = self.qformer = Config(root.need("qformer_config"), QFORMER, root.file)
        q.refuse_unless("use_qformer_text_input", False)
        self.n_queries, self.q_width, self.q_layers, self.every = root.count("num_query_tokens"), *(q.count(n) for n in (
            "hidden_size", "num_hidden_layers", "cross_attention_frequency"))
        s = self.images = image_settings(root.file.parent, IMAGES)
        if s.need("size") not in (self.image_size, {"height": self.image_size, "width": self.image_size}):
            raise UnsupportedModelError(f"{s.file}: 'size' is {s.need('size')!r} for an encoder of {self.image_size} pixels")

    def write_keys(self, out: GGUFWriter) -> None:
        """Write the keys "clip.*"."""
        write_encoder_keys(
            out, self.vision, self.images, projector="instructblip" if self.reads else "blip2", image_size=self.image_size, d_model=self.width, d_ff=self.d_ff,
            n_layers=self.n_layers, n_heads=self.n_heads, eps=self.vision.need("layer_norm_eps"), d_text=self.d_text)
        q, at = self.qformer, "clip.vision.qformer"
        for name, value in (("block_count", self.q_layers), ("query_count", self.n_queries), ("embedding_length", self.q_width),
                            ("feed_forward_length", q.count("intermediate_size")), ("attention.head_count", q.count("num_attention_heads")),
                            ("cross_attention_frequency", self.every)):
            out.add_uint32(f"{at}.{name}", value)
        out.add_float32(f"{at}.attention.layer_norm_epsilon", q.need("layer_norm_eps"))
        out.add_string(f"{at}.hidden_act", q.need("hidden_act"))
        if self.reads:
            words = read_vocabulary(self.root.file.parent / READS, {})
            if words.model != "bert":
                raise InvalidModelError(f"{self.root.file.parent / READS}: there is no BERT vocabulary, by which the Q-Former reads the prompt")
            words.write_below(out, at, q.count("vocab_size"))
        if any(self.root.get(name) is not None for name in ("image_token_index", "image_token_id")):
            out.add_uint32("clip.vision.image_token_id", self.root.token("image_token_index", "image_token_id"))

    def unused(self) -> set[str]:
        """Return names of tensors that are left out: the feed-forward of text in the last layer, behind which only the queries are taken."""
        last = [entry.source for entry in self.feed_forward("", f"qformer.encoder.layer.{self.q_layers - 1}", "")] if self.reads else []
        return {*last, "qformer.embeddings.position_ids"}

    def tensors(self) -> Tensors:
        """List the tensors of encoder, Q-Former and projection."""
        v, p, n, at = self.width, self.patch_size, (self.image_size // self.patch_size) ** 2, "vision_model"
        yield Entry("v.patch_embd.weight", f"{at}.embeddings.patch_embedding.weight", (v, 3, p, p), instead=FLOAT32)
        yield Entry("v.patch_embd.bias", f"{at}.embeddings.patch_embedding.bias", (v,))
        yield Entry("v.class_embd", f"{at}.embeddings.class_embedding", (1, 1, v), instead=FLOAT32)
        yield Entry("v.position_embd.weight", f"{at}.embeddings.position_embedding", (1, n + 1, v), instead=FLOAT32)
        yield from layer_norm("v.post_ln", f"{at}.post_layernorm", v)
        for i in range(self.n_layers):
            b, m = f"v.blk.{i}", f"{at}.encoder.layers.{i}"
            yield from layer_norm(f"{b}.ln1", f"{m}.layer_norm1", v)
            yield from linear(f"{b}.attn_qkv", f"{m}.self_attn.qkv", 3 * v, v, bool(self.vision.need("qkv_bias")))
            yield from linear(f"{b}.attn_out", f"{m}.self_attn.projection", v, v, True)
            yield from layer_norm(f"{b}.ln2", f"{m}.layer_norm2", v)
            yield from feed_forward(b, f"{m}.mlp", v, self.d_ff, {"ffn_up": "fc1", "ffn_down": "fc2"})
        yield Entry("mm.proj_query", "query_tokens", (1, self.n_queries, self.q_width), instead=FLOAT32)
        if self.reads:
            n_words, n_places, at = self.qformer.count("vocab_size"), self.qformer.count("max_position_embeddings"), "qformer.embeddings"
            yield Entry("mm.token_embd.weight", f"{at}.word_embeddings.weight", (n_words, self.q_width))
            yield Entry("mm.position_embd.weight", f"{at}.position_embeddings.weight", (n_places, self.q_width), instead=FLOAT32)
        yield from layer_norm("mm.proj_norm", f"qformer.{'embeddings.' * self.reads}layernorm", self.q_width)
        for i in range(self.q_layers):
            b, m = f"mm.proj_blk.{i}", f"qformer.encoder.layer.{i}"
            yield from self.attentions(b, m, i % self.every == 0)
            yield from self.feed_forward(f"{b}.ffn", m, "_query")
            if self.reads and i < self.q_layers - 1:
                yield from self.feed_forward(f"{b}.ffn_text", m, "")
        yield from linear("mm.proj_linear", "language_projection", self.d_text, self.q_width, True)

    def attentions(self, b: str, m: str, crosses: bool) -> Tensors:
        """List the attention of a layer of the Q-Former, and that to the picture's rows where it has one."""
        d = self.q_width
        for name, source, width in (("self_attn", "attention", d), *([("cross_attn", "crossattention", self.width)] if crosses else [])):
            for part, theirs, n_in in (("q", "attention.query", d), ("k", "attention.key", width), ("v", "attention.value", width),
                                       ("out", "output.dense", d)):
                yield from linear(f"{b}.{name}_{part}", f"{m}.{source}.{theirs}", d, n_in, True)
            yield from layer_norm(f"{b}.{name}_norm", f"{m}.{source}.output.LayerNorm", d)

    def feed_forward(self, b: str, m: str, kind: str) -> Iterator[Entry]:
        """List a feed-forward of a layer of the Q-Former; `kind` is added to the checkpoint's names."""
        d, f = self.q_width, self.qformer.count("intermediate_size")
        yield from linear(f"{b}_up", f"{m}.intermediate{kind}.dense", f, d, True)
        yield from linear(f"{b}_down", f"{m}.output{kind}.dense", d, f, True)
        yield from layer_norm(f"{b}_norm", f"{m}.output{kind}.LayerNorm", d)


@converts("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration")
class Blip2(TextAndEncoder):
    def __init__(self, config: dict[str, Any], file: Path):
        root = Config(config, DEFAULTS, file)
        text = root.need("text_config")
        kind = text.get("model_type", "opt")
        if kind not in TEXTS:
            raise UnsupportedModelError(f"{file}: the text model is {kind!r}; this converter knows {', '.join(TEXTS)}")
        name, self.renames = TEXTS[kind]
        alone = supported()[name]
        own = type(alone.__name__, (alone,), {"renames": self.renames})          # one that looks into the checkpoint itself finds its tensors too
        self.text = own({**text, "architectures": [name]}, file)
        self.arch, self.vocab_size = self.text.arch, self.text.vocab_size
        if text.get("word_embed_proj_dim") not in (None, self.text.d_model):
            raise UnsupportedModelError(f"{file}: 'word_embed_proj_dim' is {text['word_embed_proj_dim']}: pictures' rows would not be as wide as tokens")
        self.encoder = Queries(root, self.text.d_model, "InstructBlipForConditionalGeneration" in config["architectures"])

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        vocabulary.chat_template = vocabulary.chat_template or (ONE_INSTRUCTION if self.encoder.reads else TEMPLATE)
