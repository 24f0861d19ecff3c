"""What sentence-transformers keeps beside a checkpoint: pooling, layers behind it, the longest text, prompts. Reimers & Gurevych 2019, arXiv:1908.10084.

`modules.json` lists what a text goes through; each module has a folder of its own. Keys of GGUF: llama.cpp's `pooling_type` and `dense_2_feat_in`;
`embedding.max_tokens`, `embedding.prompts.names`, `.texts`, `.default` and `dense_2_activation` are ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFWriter, PoolingType

from pyengine.errors import UnsupportedModelError

from .checkpoint import malformed_is, read_json
from .contract import Entry

MODES = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "lasttoken": PoolingType.LAST}
OLD_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
# classes of torch.nn by their last names -> kinds of `ops.unary`
ACTIVATIONS = {"Identity": "none", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu", "Sigmoid": "sigmoid"}


class Dense(NamedTuple):
    """A layer behind the pooling: its name in the file, and where its tensors are."""

    name: str
    file: Path
    n_in: int
    n_out: int
    bias: bool
    activation: str

    @property
    def prefix(self) -> str:
        """What is put before the names of its tensors, which are the same in each such file."""
        return f"{self.name}."


class Sentences:
    """The modules of a folder; nothing where it has none.

    pooling     None where nothing says it
    lowercase   texts become small letters before they are tokenized
    checkpoint  the folder of the model itself
    """

    def __init__(self, folder: Path):
        self.folder = self.checkpoint = folder
        self.pooling: PoolingType | None = None
        self.dense: list[Dense] = []
        self.lowercase, self._cuts, self._most = False, False, None
        self.prompts: dict[str, str] = {}
        self.default_prompt: str | None = None
        modules = folder / "modules.json"
        if modules.exists():
            with malformed_is(f"{modules}: no list of modules"):
                self._read(json.loads(modules.read_text(encoding="utf-8")))
            self._read_prompts()
        elif (folder / "1_Pooling" / "config.json").exists():
            self._pool(folder / "1_Pooling" / "config.json")

    def _read(self, modules: list[dict[str, Any]]) -> None:
        kinds = [str(m["type"]).rpartition(".")[2] for m in modules]
        behind = kinds[2:-1] if kinds[-1] == "Normalize" else kinds[2:]
        if kinds[:2] != ["Transformer", "Pooling"] or set(behind) - {"Dense"} or len(behind) > 3:
            raise UnsupportedModelError(f"{self.folder / 'modules.json'}: a text goes through {', '.join(kinds)}; Transformer, Pooling, then up to three "
                                        "Dense, then Normalize are supported")
        self._pool(self.folder / modules[1]["path"] / "config.json")
        self.dense = [self._layer(f"dense_{i}", self.folder / m["path"]) for i, m in enumerate(modules[2 : 2 + len(behind)], 2)]
        self.checkpoint = self.folder / modules[0]["path"]
        settings = read_json(self.checkpoint / "sentence_bert_config.json")
        own = read_json(self.checkpoint / "tokenizer_config.json").get("model_max_length")
        self._cuts, self._most = True, settings.get("max_seq_length") or own       # as sentence-transformers' Transformer finds it
        self.lowercase = bool(settings.get("do_lower_case"))

    def _pool(self, file: Path) -> None:
        """Read the pooling, in the old form (a switch for each) or the new one. Raises: UnsupportedModelError for one that files have no number for."""
        with malformed_is(f"{file}: not a pooling"):
            said = read_json(file, required=True)
            on = [OLD_MODES.get(name, name) for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
            on = on or [said["pooling_mode"]] if "pooling_mode" in said else on
        if len(on) != 1 or on[0] not in MODES:
            raise UnsupportedModelError(f"{file}: pools by {', '.join(map(str, on)) or 'nothing'}; one of {', '.join(MODES)} is supported")
        if said.get("include_prompt", True) is not True:
            raise UnsupportedModelError(f"{file}: include_prompt is {said['include_prompt']!r}: prompts count in the pooling here")
        self.pooling = MODES[on[0]]

    @staticmethod
    def _layer(name: str, folder: Path) -> Dense:
        file = folder / "config.json"
        with malformed_is(f"{file}: not a layer"):
            said = read_json(file, required=True)
            act = str(said.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
            if act not in ACTIVATIONS:
                raise UnsupportedModelError(f"{file}: activation_function is {act!r}; {', '.join(ACTIVATIONS)} are supported")
            return Dense(name, folder / "model.safetensors", int(said["in_features"]), int(said["out_features"]), bool(said.get("bias", True)), ACTIVATIONS[act])

    def _read_prompts(self) -> None:
        file = self.folder / "config_sentence_transformers.json"
        with malformed_is(f"{file}: prompts are no texts by name"):
            said = read_json(file)
            self.prompts = {str(name): str(text) for name, text in (said.get("prompts") or {}).items()}
            self.default_prompt = said.get("default_prompt_name")
            if self.default_prompt is not None and self.default_prompt not in self.prompts:
                raise ValueError(f"default_prompt_name is {self.default_prompt!r}")

    def write_keys(self, out: GGUFWriter, usual: PoolingType | None = None) -> None:
        """Write what the modules say. usual: the pooling where they say none; None: none is written."""
        arch = out.arch
        pooling = usual if self.pooling is None else self.pooling
        if pooling is not None:
            out.add_pooling_type(pooling)
        if self._cuts:
            context = out.kv_data[0][f"{arch}.context_length"].value
            out.add_uint32(f"{arch}.embedding.max_tokens", int(min(self._most or context, context)))
        if self.prompts:
            out.add_array(f"{arch}.embedding.prompts.names", list(self.prompts))
            out.add_array(f"{arch}.embedding.prompts.texts", list(self.prompts.values()))
        if self.default_prompt is not None:
            out.add_string(f"{arch}.embedding.prompts.default", self.default_prompt)
        for layer in self.dense:
            out.add_dense_features_dims(layer.name, layer.n_in, layer.n_out)
            out.add_string(f"{arch}.{layer.name}_activation", layer.activation)

    def entries(self) -> Iterator[Entry]:
        """List the tensors of the layers behind the pooling."""
        for layer in self.dense:
            yield Entry(f"{layer.name}.weight", f"{layer.prefix}linear.weight", (layer.n_out, layer.n_in))
            if layer.bias:
                yield Entry(f"{layer.name}.bias", f"{layer.prefix}linear.bias", (layer.n_out,))
