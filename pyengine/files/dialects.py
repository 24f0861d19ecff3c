"""Other dialects of GGUF, translated once, when a file is opened: models know llama.cpp's keys and names of tensors only.

What a program's files call otherwise stands in tables. `KEYS` and `TENSORS` map its names to llama.cpp's:

    "gemma3.vision." : "clip.vision."        a beginning of keys, where it ends in a dot; otherwise a whole key
    "v.blk.*.mlp.fc1" : "v.blk.*.ffn_up"     with any layer's number for *, and whatever follows ("weight", "bias")

What they leave out, or mean otherwise, becomes keys: llama.cpp's where it has one, else our own, of which models document the usual
value. They are
    clip.vision.rope.interleaved               pairs of the encoder's q and k that turn together are neighbours (default), or a half apart
    clip.vision.projector.hidden_act           the projector's activation
    llama4.use_qk_norm                         rotated queries and keys are scaled to unit length
    qwen35.nextn_norm_offset                   what is added to the norms around the layer that predicts further tokens (0)
    qwen35.foreign_nextn                       the file has such layers in Ollama's names, which are left out
    mllama.attention.cross_interleaved         rows of q and k of cross-attention are interleaved, as for a rotation, but not their norms'

Nothing is decoded for it but a few numbers, and a file in llama.cpp's own names is handed back as it is. Names that no table has stay
what they are, and whoever binds the model says which of them it does not know.

Sources: Ollama, `convert/convert_{gemma3,gemma3n,gemma4,llama4,mistral,mllama,qwen2,qwen25vl,qwen3,qwen3vl,qwen3next}.go`, `model/models/*` as
they were, `llama/compat/llama-ollama-compat.cpp`; llama.cpp, `llama-model.cpp: load_hparams`, `tools/mtmd/clip.cpp: load_tensors`, gguf-py's
`tensor_mapping.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pyengine.errors import InvalidModelError
from pyengine.files.gguf import GGUFFile, TensorInfo

ENCODER, ENCODER_TENSORS = "clip", ("v", "mm", "model", "a")  # llama.cpp's beginnings of an encoder's keys and of its tensors' names

Table = Mapping[str, str]
_LAYER = re.compile(r"(?:(?<=^blk\.)|(?<=\.blk\.))\d+(?=\.)")


def translate(file: GGUFFile) -> GGUFFile:
    """Return the file in llama.cpp's names: the same object where it is already. Raises: InvalidModelError."""
    t = Translation(file)
    arch = t.get("general.architecture", str)
    rope_scaling(t, arch)
    if arch in DIALECTS:
        DIALECTS[arch](t)
    first_projector(t)
    first_tokenizer(t)
    later_norm(t)
    exchanged_feed_forward(t)
    return t.file()


def check_encoder(file: GGUFFile) -> None:
    """Raise InvalidModelError for a file that is no encoder's own: its general.architecture would be what its keys begin with."""
    found = file.metadata.need("general.architecture", str)
    if found != ENCODER:
        raise InvalidModelError(f"{file.path}: general.architecture is {found!r}; a projector file has {ENCODER!r}")


def is_projector(file: GGUFFile) -> bool:
    """Say whether a file holds an encoder that stands beside a model, and is none."""
    whole = file.metadata.get(f"{ENCODER}.has_text_encoder", False) or "visual_projection.weight" in file.tensors
    return file.metadata.get("general.architecture") == ENCODER and not whole


class Translation:
    """New names of a file's keys and tensors, and keys that it lacks."""

    def __init__(self, file: GGUFFile):
        self.source = file
        self.keys: dict[str, str] = {}       # the file's -> llama.cpp's, where they differ
        self.own: dict[str, str] = {}        # the same, back
        self.tensors: dict[str, str | None] = {}        # the file's -> llama.cpp's; None: left out
        self.placed: dict[str, TensorInfo] = {}         # llama.cpp's -> where it lies in a tensor of the file
        self.added: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.added or key in self.own or key in self.source.metadata and key not in self.keys

    def get(self, key: str, *kinds: type) -> Any:
        """Return a key's value by llama.cpp's name; None where it is missing, or of another kind, which its reader will report."""
        if key not in self:
            return None
        value = self.added[key] if key in self.added else self.source.metadata[self.own.get(key, key)]
        return value if type(value) in kinds else None

    def rename_keys(self, table: Table) -> None:
        """Give keys their names of the table, the first that fits; a key that has llama.cpp's name in the file is believed instead."""
        starts = tuple((theirs, ours) for theirs, ours in table.items() if theirs.endswith("."))
        for key in self.source.metadata:
            new = table.get(key) or next((ours + key[len(theirs):] for theirs, ours in starts if key.startswith(theirs)), None)
            if new is not None and new not in self:
                self.keys[key], self.own[new] = new, key

    def rename_tensors(self, table: Table) -> None:
        """Give tensors their names of the table."""
        for name in self.source.tensors:
            layer = _LAYER.search(name)
            pattern = name if layer is None else f"{name[:layer.start()]}*{name[layer.end():]}"
            for theirs in (pattern, pattern.rpartition(".")[0]):
                if theirs in table:
                    new = table[theirs] + pattern[len(theirs):]
                    self.tensors[name] = new if layer is None else new.replace("*", layer[0], 1)
                    break

    def add(self, key: str, value: Any) -> None:
        """Give a key that the file lacks its value."""
        if key not in self:
            self.added[key] = value

    def replace(self, key: str, value: Any) -> None:
        """Give a key this value, whatever the file says."""
        self.added[key] = value

    def has_tensor(self, name: str) -> bool:
        """Say whether the file has a tensor under this name of its own."""
        return name in self.source.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor under this name of its own; () where there is none."""
        return self.source.tensors[name].shape if name in self.source.tensors else ()

    def encoder_layers(self) -> int:
        """Return the number of the encoder's layers that a file gives; 0 where it gives more than it has tensors."""
        n = self.get("clip.vision.block_count", int) or 0
        return n if 0 < n <= len(self.source.tensors) else 0

    def leave_out(self, *starts: str) -> None:
        """Leave out tensors with these beginnings of their own names."""
        self.tensors.update((name, None) for name in self.source.tensors if name.startswith(starts))

    def place(self, new: str, name: str, shape: tuple[int, ...], first: int = 0) -> None:
        """Call by llama.cpp's name what lies in a tensor of the file from element `first` on, in this shape."""
        self.tensors[name] = None
        self.placed[new] = self.source.tensors[name].within(shape, first)

    def file(self) -> GGUFFile:
        """Return the file with the changes made here. Raises: InvalidModelError where two of its tensors are the same one."""
        if not (self.keys or self.tensors or self.added):
            return self.source
        return self.source.renamed(self.tensors, self.source.metadata.renamed(self.keys, self.added), self.placed)


# ---- of any architecture: llama.cpp's files as they once were, mostly -----------------------------------------------------------


def rope_scaling(t: Translation, arch: str | None) -> None:
    """Translate the name of the divisor of positions from before there were kinds of scaling (llama.cpp, LLM_KV_ROPE_SCALE_LINEAR);
    Ollama's words for none, and its names of YaRN's bounds: its files hold "" and 0 for what a checkpoint does not say.
    """
    rope = f"{arch}.rope."
    if t.get(f"{rope}scaling.type", str) in ("", "default"):
        t.replace(f"{rope}scaling.type", "none")
    if f"{rope}scale_linear" in t:
        t.rename_keys({f"{rope}scale_linear": f"{rope}scaling.factor"})
    for bound in ("beta_fast", "beta_slow"):
        if t.get(f"{rope}scaling.{bound}", float, int):
            t.rename_keys({f"{rope}scaling.{bound}": f"{rope}scaling.yarn_{bound}"})


def first_projector(t: Translation) -> None:
    """Name the projector of LLaVA's first files, which there was only one of then: two products with a GELU between."""
    if t.get("clip.has_llava_projector", bool) and not ("clip.projector_type" in t or "clip.vision.projector_type" in t):
        t.add("clip.projector_type", "mlp")


def first_tokenizer(t: Translation) -> None:
    """Name the tokenizer of clip.cpp's files, which hold the tokens alone (`models/convert_hf_to_gguf.py` there)."""
    if t.get("clip.has_text_encoder", bool) and "tokenizer.ggml.tokens" in t:
        t.add("tokenizer.ggml.model", "clip")


def later_norm(t: Translation) -> None:
    """Translate Llama 4's second norm: since Gemma 4 gguf-py's table has another entry for it, which converters write."""
    if "llama4" in (t.get("clip.projector_type", str), t.get("clip.vision.projector_type", str)):
        if not t.has_tensor("v.blk.0.ln2.weight"):
            t.rename_tensors({"v.blk.*.attn_post_norm": "v.blk.*.ln2"})


def exchanged_feed_forward(t: Translation) -> None:
    """Swap ffn_down and ffn_up where the first converters of encoders (for CLIP, Qwen2-VL, Gemma 3, Llama 3.2 Vision) wrote the file:
    they called the first matrix ffn_down, the second ffn_up.
    """
    for key, start in (("clip.vision.embedding_length", "v."), ("clip.text.embedding_length", "t.")):
        if (width := t.get(key, int)) is not None:
            _exchange(t, width, start)


def _exchange(t: Translation, width: int, start: str) -> None:
    """Do so for the layers of one encoder, whose tensors begin so."""
    kept = ((t.tensors.get(name, name), name) for name in t.source.tensors)
    names = {new: name for new, name in kept if new is not None}
    for name, own in names.items():
        scope, _, end = name.partition(".ffn_down.")
        shape = t.source.tensors[own].shape
        if end == "weight" and scope.startswith(start) and len(shape) == 2 and shape[1] == width != shape[0]:
            for one, other in (("ffn_down", "ffn_up"), ("ffn_up", "ffn_down")):
                for kind in ("weight", "bias"):
                    if (found := names.get(f"{scope}.{one}.{kind}")) is not None:
                        t.tensors[found] = f"{scope}.{other}.{kind}"


# ---- Gemma 3 --------------------------------------------------------------------------------------------------------------------

GEMMA3_TENSORS = {
    "v.patch_embedding": "v.patch_embd", "v.position_embedding": "v.position_embd", "v.post_layernorm": "v.post_ln",
    "v.blk.*.layer_norm1": "v.blk.*.ln1", "v.blk.*.layer_norm2": "v.blk.*.ln2", "v.blk.*.attn_output": "v.blk.*.attn_out",
    "v.blk.*.mlp.fc1": "v.blk.*.ffn_up", "v.blk.*.mlp.fc2": "v.blk.*.ffn_down",
    "mm.mm_soft_emb_norm": "mm.soft_emb_norm", "mm.mm_input_projection": "mm.input_projection",
}
GEMMA3_KEYS = {
    "gemma3.rope.global.freq_base": "gemma3.rope.freq_base", "gemma3.rope.local.freq_base": "gemma3.rope.freq_base_swa",
    "gemma3.mm.tokens_per_image": "clip.vision.tokens_per_image", "gemma3.vision.": "clip.vision.",
}
GEMMA3_EPS, GEMMA3_ROPE_BASE = 1e-6, 1_000_000.0     # transformers Gemma3TextConfig, where Ollama's files have no key
GEMMA3_LONG, GEMMA3_FACTOR = 131_072, 8.0            # 4B and up scale positions linearly (their config.json); Ollama's files do not say
GEMMA3_27B = 62                                      # layers; see below


def gemma3(t: Translation) -> None:
    """Translate Ollama's single files (`convert_gemma3.go`); add what llama.cpp knows of the 27B model by its number of layers."""
    sees = "gemma3.vision.block_count" in t
    t.rename_keys(GEMMA3_KEYS)
    if sees:
        t.rename_tensors(GEMMA3_TENSORS)
        scaled = "gemma3.rope.scaling.type" in t or "gemma3.rope.scaling.factor" in t
        if not scaled and (t.get("gemma3.context_length", int) or 0) >= GEMMA3_LONG:
            t.add("gemma3.rope.scaling.type", "linear")
            t.add("gemma3.rope.scaling.factor", GEMMA3_FACTOR)
    t.add("gemma3.attention.layer_norm_rms_epsilon", GEMMA3_EPS)
    t.add("gemma3.rope.freq_base", GEMMA3_ROPE_BASE)
    # query_pre_attn_scalar is d_model / n_heads in the 27B checkpoint, the one of 62 layers, and the size of a head in all others
    # (their config.json; llama.cpp, load_hparams): no converter but ours writes it.
    if t.get("gemma3.block_count", int) == GEMMA3_27B:
        d_model, n_heads = t.get("gemma3.embedding_length", int), t.get("gemma3.attention.head_count", int)
        if d_model and n_heads and d_model > 0 < n_heads:
            t.add("gemma3.attention.scale", (d_model / n_heads) ** -0.5)


# ---- Llama 4 --------------------------------------------------------------------------------------------------------------------

LLAMA4_TENSORS = {
    "v.patch_embedding": "v.patch_embd", "v.class_embedding": "v.class_embd", "v.positional_embedding_vlm": "v.position_embd.weight",
    "v.layernorm_pre": "v.pre_ln", "v.layernorm_post": "v.post_ln", "v.blk.*.attn_norm": "v.blk.*.ln1",
    "v.blk.*.ffn_norm": "v.blk.*.ln2", "v.blk.*.attn_output": "v.blk.*.attn_out", "v.blk.*.mlp.fc1": "v.blk.*.ffn_up",
    "v.blk.*.mlp.fc2": "v.blk.*.ffn_down", "v.vision_adapter.mlp.fc1": "mm.model.mlp.1", "v.vision_adapter.mlp.fc2": "mm.model.mlp.2",
    "mm.linear_1": "mm.model.fc",
}
LLAMA4_KEYS = {"llama4.vision.layer_norm_epsilon": "clip.vision.attention.layer_norm_epsilon", "llama4.vision.": "clip.vision."}
MAVERICK = 128                       # experts; see below


def llama4(t: Translation) -> None:
    """Translate Ollama's single files (`convert_llama4.go`); add what llama.cpp knows of Maverick by its number of experts."""
    if "llama4.vision.block_count" in t:
        t.rename_keys(LLAMA4_KEYS)
        t.rename_tensors(LLAMA4_TENSORS)
        t.add("clip.projector_type", "llama4")
        if "llama4.intermediate_size" in t:      # of dense layers, and feed_forward_length an expert's
            t.rename_keys({"llama4.feed_forward_length": "llama4.expert_feed_forward_length"})
            t.rename_keys({"llama4.intermediate_size": "llama4.feed_forward_length"})
        ratio = t.get("clip.vision.pixel_shuffle_ratio", float, int)
        if ratio is not None:        # of sides: a half joins 2 x 2 patches
            if not 2**-16 <= ratio <= 1:
                raise InvalidModelError(f"{t.source.path}: llama4.vision.pixel_shuffle_ratio is {ratio}: must be above 0, and at most 1")
            t.add("clip.vision.projector.scale_factor", round(1 / ratio))
    if t.get("llama4.expert_count", int) == MAVERICK:        # which has no q/k-norm: llama.cpp, load_arch_hparams
        t.add("llama4.use_qk_norm", False)


# ---- Mistral Small 3.1 and 3.2 --------------------------------------------------------------------------------------------------

MISTRAL3_TENSORS = {
    "v.patch_conv": "v.patch_embd", "v.encoder_norm": "v.pre_ln", "v.blk.*.attn_norm": "v.blk.*.ln1", "v.blk.*.ffn_norm": "v.blk.*.ln2",
    "v.blk.*.attn_output": "v.blk.*.attn_out", "mm.norm": "mm.input_norm", "mm.patch_merger.merging_layer": "mm.patch_merger",
    "mm.linear_1": "mm.1", "mm.linear_2": "mm.2",
}
MISTRAL3_KEYS = {
    "mistral3.spatial_merge_size": "clip.vision.spatial_merge_size",
    "mistral3.mm.projector_hidden_act": "clip.vision.projector.hidden_act", "mistral3.vision.": "clip.vision.",
}
MISTRAL3_TEXT_KEYS = {               # of Ministral 3
    "mistral3.rope.scaling_beta": "mistral3.attention.temperature_scale",
    "mistral3.rope.scaling.mscale_all_dim": "mistral3.rope.scaling.yarn_log_multiplier",
}
MISTRAL3_MERGE = 2                   # of a file without the key: model.go, newMultiModalProjector


def mistral3(t: Translation) -> None:
    """Translate Ollama's single files (`convert_mistral.go`, `model/models/mistral3/*.go`).

    The encoder's q and k have transformers' halves there, while those of the decoder have their rows permuted as llama's. Its
    activation is in no key: it is SiLU.
    """
    t.rename_keys(MISTRAL3_TEXT_KEYS)
    if "mistral3.vision.block_count" in t:
        t.rename_keys(MISTRAL3_KEYS)
        t.rename_tensors(MISTRAL3_TENSORS)
        t.add("clip.projector_type", "pixtral")
        t.add("clip.vision.hidden_act", "silu")
        t.add("clip.vision.spatial_merge_size", MISTRAL3_MERGE)
        t.add("clip.vision.rope.interleaved", False)


# ---- Llama 3.2 Vision -----------------------------------------------------------------------------------------------------------

MLLAMA_TENSORS = {f"{scope}.{theirs}": f"{scope}.{ours}" for scope in ("v.blk.*", "v.global.blk.*")
                  for theirs, ours in (("attn_norm", "ln1"), ("ffn_norm", "ln2"), ("attn_output", "attn_out"))}
MLLAMA_KEYS = {"mllama.vision.intermediate_layers_indices": "clip.vision.feature_layer", "mllama.vision.": "clip.vision."}


def mllama(t: Translation) -> None:
    """Translate Ollama's files. Names of tensors are those of its published one, which ours share; `convert_mllama.go` has others
    for the encoder's norms and output, and interleaves the rows of all queries and keys as for a rotation, but not their norms'
    weights.
    """
    if "mllama.vision.block_count" in t:
        t.rename_keys(MLLAMA_KEYS)
    if t.has_tensor("v.blk.0.attn_norm.weight"):
        t.rename_tensors(MLLAMA_TENSORS)
        t.add("mllama.attention.cross_interleaved", True)


# ---- Qwen2-VL and Qwen2.5-VL ----------------------------------------------------------------------------------------------------

QWEN25VL_TENSORS = {
    "v.patch_embd_0.weight": "v.patch_embd.weight", "v.patch_embd_1.weight": "v.patch_embd.weight.1",
    "v.merger.ln_q": "v.post_ln", "v.merger.mlp.0": "mm.0", "v.merger.mlp.2": "mm.2",
}
QWEN25VL_KEYS = {
    "qwen25vl.vision.fullatt_block_indexes": "clip.vision.wa_layer_indexes",
    "qwen25vl.vision.max_pixels": "clip.vision.image_max_pixels", "qwen25vl.vision.": "clip.vision.",
    "qwen25vl.rope.mrope_section": "qwen2vl.rope.dimension_sections", "qwen25vl.": "qwen2vl.",
}
QWEN25VL_FULL = (7, 15, 23, 31)      # layers, of a file without the key: model_vision.go, newVisionModel


def qwen25vl(t: Translation) -> None:
    """Translate Qwen2.5-VL, which Ollama has under a name of its own (`convert_qwen25vl.go`, `model/models/qwen25vl/*.go`); text
    tensors have llama.cpp's names. Ids of special tokens, mean and deviation are in no key: the model has the authors'.
    """
    t.rename_keys(QWEN25VL_KEYS)
    t.rename_tensors(QWEN25VL_TENSORS)
    t.replace("general.architecture", "qwen2vl")
    t.add("clip.projector_type", "qwen2.5vl_merger")
    t.add("clip.vision.hidden_act", "silu")
    t.add("clip.vision.wa_layer_indexes", np.array(QWEN25VL_FULL, np.int32))


def qwen2vl(t: Translation) -> None:
    """Translate Ollama's name of the sections of the rotation (`convert_qwen2.go`)."""
    t.rename_keys({"qwen2vl.rope.mrope_section": "qwen2vl.rope.dimension_sections"})


# ---- Qwen3-VL, Qwen3.5, Qwen3-Next ------------------------------------------------------------------------------------------------

QWEN3VL_TENSORS = {
    "v.patch_embed.bias": "v.patch_embd.bias", "v.pos_embed": "v.position_embd", "v.blk.*.norm1": "v.blk.*.ln1", "v.blk.*.norm2": "v.blk.*.ln2",
    "v.blk.*.mlp.linear_fc1": "v.blk.*.ffn_up", "v.blk.*.mlp.linear_fc2": "v.blk.*.ffn_down",
    "v.merger.norm": "v.post_ln", "v.merger.linear_fc1": "mm.0", "v.merger.linear_fc2": "mm.2",
}
QWEN3VL_SECTIONS = 24, 20, 20        # of a file without the key: mrope_section of all published Qwen3-VL
DEEPSTACK = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}


def qwen3vl(t: Translation) -> None:
    """Translate Ollama's single files of Qwen3-VL, dense and with experts; those of llama.cpp have another file for the encoder.

    Features for the decoder's first layers are counted there, not named by the encoder's layer, and experts' width is in no key.
    """
    arch = t.get("general.architecture", str)
    if f"{arch}.vision.block_count" not in t:
        return
    t.rename_keys({f"{arch}.rope.mrope_section": f"{arch}.rope.dimension_sections"})
    t.add(f"{arch}.rope.dimension_sections", np.array(QWEN3VL_SECTIONS, np.int32))
    experts = t.shape("blk.0.ffn_gate_exps.weight")
    if len(experts) == 3:
        t.add(f"{arch}.expert_feed_forward_length", experts[1])
    t.add(f"{arch}.n_deepstack_layers", len(qwen3vl_encoder(t, arch)))


def qwen3vl_encoder(t: Translation, arch: str) -> list[int]:
    """Translate the encoder; return the layers behind which features for the decoder are taken."""
    t.rename_keys({f"{arch}.vision.shortest_edge": "clip.vision.image_min_pixels", f"{arch}.vision.longest_edge": "clip.vision.image_max_pixels",
                   f"{arch}.vision.": "clip.vision."})
    t.add("clip.projector_type", "qwen3vl_merger")
    t.add("clip.use_gelu", True)
    indexes, count = t.get("clip.vision.deepstack_visual_indexes", np.ndarray), t.encoder_layers()
    deep = [] if indexes is None else indexes.tolist()
    if all(isinstance(i, int) and 0 <= i < count for i in deep):
        t.add("clip.vision.is_deepstack_layers", np.isin(np.arange(count), deep))
    t.rename_tensors(QWEN3VL_TENSORS)
    counted = "v.deepstack_merger" if any(name.startswith("v.deepstack_merger.") for name in t.source.tensors) else "v.deepstack"
    t.rename_tensors({f"{counted}.{k}.{theirs}": f"v.deepstack.{layer}.{ours}" for k, layer in enumerate(deep) for theirs, ours in DEEPSTACK.items()})
    for name in ("v.patch_embed.weight", "v.patch_embd.weight"):               # [width * channels, frames, p, p]
        shape, channels = t.shape(name), t.get("clip.vision.num_channels", int) or 3
        if len(shape) == 4 and shape[1] == 2 and shape[0] % channels == 0:
            t.place("v.patch_embd.weight", name, (shape[0] // channels, channels, 2, shape[2] * shape[3]))
    return deep


NEXTN = {"mtp.fc": "eh_proj", "mtp.pre_fc_norm_embedding": "enorm", "mtp.pre_fc_norm_hidden": "hnorm", "mtp.norm": "shared_head_norm"}


def qwen35(t: Translation) -> None:
    """Translate Ollama's files of Qwen3.5 and Qwen3-Next. Its older ones have the layer that predicts further tokens as checkpoints name it, where
    1 is added to norms by the ends of their names: those around the layer lack it. With experts, which are apart there, it is left out.

    Which layers keep a state is said there by heads of keys and values that are none.
    """
    arch = t.get("general.architecture", str)
    t.tensors.update((name, f"{name}.bias") for name in t.source.tensors if name.endswith(".ssm_dt"))
    more, n_layers = [name for name in t.source.tensors if name.startswith("mtp.")], t.get(f"{arch}.block_count", int)
    layer = {name for name in more if name.startswith("mtp.layers.")}
    known = n_layers is not None and all(t.has_tensor(f"{name}.weight") for name in NEXTN) and layer and all(
        name.startswith("mtp.layers.0.") and ".mlp." not in name for name in layer)
    if known:
        behind = "blk.*".replace("*", str(n_layers))
        t.tensors |= {f"{name}.weight": f"{behind}.nextn.{ours}.weight" for name, ours in NEXTN.items()}
        t.tensors |= {name: f"{behind}.{name.removeprefix('mtp.layers.0.')}" for name in layer}
        t.replace(f"{arch}.block_count", n_layers + 1)
        t.add(f"{arch}.nextn_predict_layers", 1)
        t.add(f"{arch}.nextn_norm_offset", 1.0)
    elif more:
        t.leave_out("mtp.")
        t.add(f"{arch}.foreign_nextn", True)
    heads = t.get(f"{arch}.attention.head_count_kv", np.ndarray)
    if heads is not None and len(heads) and heads.dtype.kind in "iu":
        t.replace(f"{arch}.attention.head_count_kv", int(heads.max()))
        t.add(f"{arch}.attention.recurrent_layers", np.append(heads == 0, [False] * bool(known)))
    if f"{arch}.vision.block_count" in t:
        qwen3vl_encoder(t, arch)


# ---- Gemma 3n and 4 -----------------------------------------------------------------------------------------------------------------

CLAMPED = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_gate", "ffn_up", "ffn_down")        # products of a layer, and bounds of each:
BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def gemma4(t: Translation) -> None:
    """Translate Ollama's single files. Bounds of the encoder's products are there one by one, packed into one tensor, or both."""
    t.rename_tensors({"blk.*.ffn_gate_inp.per_expert_scale": "blk.*.ffn_down_exps.scale"})
    if "gemma4.vision.block_count" not in t:
        return
    t.rename_keys({"gemma4.vision.": "clip.vision."})
    t.add("clip.vision.projector_type", "gemma4v")
    if t.has_tensor("v.blk.0.attn_q.input_min"):
        t.leave_out("v.clamp_data")
    elif t.has_tensor("v.clamp_data"):
        names = [f"v.blk.{i}.{name}" for i in range(t.encoder_layers()) for name in CLAMPED] + ["mm.input_projection"]
        for i, (name, bound) in enumerate((name, bound) for name in names for bound in BOUNDS):
            t.place(f"{name}.{bound}", "v.clamp_data", (1,), i)


def gemma3n(t: Translation) -> None:
    """Translate Ollama's files of the text model; ids of pictures and sounds, which have rows in one of two tables only, are left out."""
    t.rename_keys({"gemma3n.head_dim": "gemma3n.attention.key_length", "gemma3n.rope.freq_base_local": "gemma3n.rope.freq_base_swa"})
    embedding, own = t.shape("token_embd.weight"), t.shape("per_layer_token_embd.weight")
    if len(embedding) == len(own) == 2 and embedding[0] > own[0]:
        t.place("token_embd.weight", "token_embd.weight", (own[0], embedding[1]))


GPTOSS_TENSORS = {"blk.*.attn_out": "blk.*.attn_output", "blk.*.attn_sinks": "blk.*.attn_sinks.weight", "blk.*.ffn_norm": "blk.*.post_attention_norm"}


def gptoss(t: Translation) -> None:
    """Translate the gpt-oss files that Ollama published (`convert_gptoss.go` as it was; `llama-ollama-compat.cpp`, handle_gptoss): no kind of
    scaling, the width of all experts as that of the feed-forward, and a vocabulary that says nothing of how texts are cut into words.
    """
    t.rename_keys({"gptoss.": "gpt-oss."})
    t.rename_tensors(GPTOSS_TENSORS)
    t.replace("general.architecture", "gpt-oss")
    t.replace("tokenizer.ggml.pre", "gpt-4o")
    t.add("gpt-oss.rope.scaling.type", "yarn")
    width = t.get("gpt-oss.feed_forward_length", int)
    if width is not None:
        t.add("gpt-oss.expert_feed_forward_length", width)


# by general.architecture
DIALECTS: dict[str | None, Callable[[Translation], None]] = {
    "gemma3": gemma3, "gemma3n": gemma3n, "gemma4": gemma4, "gptoss": gptoss, "llama4": llama4, "mistral3": mistral3, "mllama": mllama,
    "qwen25vl": qwen25vl, "qwen2vl": qwen2vl, "qwen35": qwen35, "qwen35moe": qwen35, "qwen3next": qwen35, "qwen3vl": qwen3vl, "qwen3vlmoe": qwen3vl,
}
