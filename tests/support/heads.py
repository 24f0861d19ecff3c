"""Checkpoints of heads that predict further tokens, with random weights, and what they say of a text by code that is not ours.

    MTP          in the model's own checkpoint: transformers' `MtpModel`, under the names of published ones
    assistants   of Gemma 4, in checkpoints of their own: transformers' `Gemma4AssistantForCausalLM`
    EAGLE-3      which transformers does not have: written here in torch, after arXiv:2503.01840 and the authors' code (cnets.py)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Reference = Callable[[list[int], int], list[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Made:
    """A model's file, that of a head beside it, what its drafts are called, and what the head says behind each of the last tokens of a text of
    which the model has read the first n."""

    path: Path
    draft: Path | None
    origin: str
    wanted: Reference

# -- MTP ------------------------------------------------------------------------------------------------------------------

NAMES = {"layers.0.eh_proj.": "mtp.fc.", "layers.0.enorm.": "mtp.pre_fc_norm_embedding.", "layers.0.hnorm.": "mtp.pre_fc_norm_hidden.",
         "layers.0.post_norm.": "mtp.norm.", "layers.0.mtp_block.": "mtp.layers.0."}


def add_head(folder: Path, out: Path, seed: int = 3, spread: float = 0.05) -> Reference:
    """Write a text checkpoint again, with a head of random weights; return what the head says."""
    import torch
    from safetensors.numpy import load_file, save_file
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpLayer, MtpModel

    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    main.config.num_mtp_layers, main.config.mtp_layer_types = 1, ["full_attention"]
    head = MtpModel(main, 1)
    head.layers[0] = MtpLayer(head.config, type(main.model.layers[-1]), type(main.model.norm), 0)        # not that of a delta net's heads
    head.eval()
    rng, more = np.random.default_rng(seed), {}
    for name, weight in head.state_dict().items():
        known = next((theirs for ours, theirs in NAMES.items() if name.startswith(ours)), None)
        if known is None:                                    # the embedding and the output head, which are the model's
            continue
        value = rng.normal(0, spread, weight.shape).astype(np.float32)
        weight.data.copy_(torch.from_numpy(value))
        more[known + name.removeprefix(next(ours for ours in NAMES if name.startswith(ours)))] = value
    shutil.copytree(folder, out)
    file = out / "model.safetensors"
    save_file(load_file(file) | more, file)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 1}))

    def wanted(ids: list[int], n: int) -> list[np.ndarray]:
        with torch.no_grad():
            hidden, found = main.model(torch.tensor([ids[:n]])).last_hidden_state, []
            for last in range(n, len(ids)):                  # it goes on with its own states
                at = torch.arange(1, last + 1)[None]
                own = head.forward_layer(0, hidden, at, None, input_ids=torch.tensor([ids[1 : last + 1]]))
                found.append(main.lm_head(own[0, -1]).numpy())
                hidden = torch.cat([hidden, own[:, -1:]], dim=1)
        return found

    return wanted


# -- assistants of Gemma 4 --------------------------------------------------------------------------------------------------

ASSISTANT = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32,
             "global_head_dim": 64, "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "num_kv_shared_layers": 4,
             "sliding_window": 6, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "max_position_embeddings": 256}


@contextmanager
def layers_that_store() -> Iterator[None]:
    """Let the last layer of each kind that has a cache give its keys and values, as transformers 5.23's own comment has it: without layers that
    share none does, and where all share, as an assistant's do, it refuses the config."""
    from unittest.mock import patch

    from transformers import Gemma4TextConfig

    def modes(self: Any) -> list[str | None]:
        first = self.num_hidden_layers - self.num_kv_shared_layers
        last = {kind: i for i, kind in enumerate(self.layer_types[:first])}
        return ["reuse" if i >= first else "store" if i in last.values() else None for i in range(self.num_hidden_layers)]

    with patch.object(Gemma4TextConfig, "kv_sharing_modes", property(modes)):
        yield


def add_assistant(folder: Path, out: Path, seed: int = 5, **text: Any) -> Reference:
    """Write an assistant of random weights for a Gemma 4 checkpoint; return what it says."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma4AssistantConfig, Gemma4AssistantForCausalLM

    with layers_that_store():
        main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        config = Gemma4AssistantConfig(text_config={"model_type": "gemma4_text", **ASSISTANT, "num_key_value_heads": 2, **text},
                                       backbone_hidden_size=main.config.hidden_size)
        head = Gemma4AssistantForCausalLM._from_config(config, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(seed)
    scalars = [(name, b) for name, b in head.named_buffers() if name.endswith("layer_scalar")]
    with torch.no_grad():
        for _, p in sorted([*head.named_parameters(), *scalars], key=lambda named: named[0]):
            noise = torch.randn(p.shape, generator=random)
            p.copy_(1.0 + 0.3 * noise if p.dim() == 1 else 1.5 * noise / p[0].numel() ** 0.5)
    head.save_pretrained(out)

    def wanted(ids: list[int], n: int) -> list[np.ndarray]:
        found, seen = [], main.config.sliding_window - 1                       # keys in the window of the token's place
        with torch.no_grad(), layers_that_store():
            read = main(torch.tensor([ids[:n]]), use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
            shared = {kind: tuple(x[:, :, -seen:] if kind == "sliding_attention" else x for x in both) for kind, both in read.shared_kv_states.items()}
            state = read.hidden_states[-1][:, -1:]
            for token in ids[n:]:
                x = torch.cat([main.get_input_embeddings()(torch.tensor([[token]])), state], dim=-1)
                made = head(inputs_embeds=x, position_ids=torch.tensor([[n]]), shared_kv_states=shared, use_cache=False)
                found.append(made.logits[0, 0].numpy())
                state = made.last_hidden_state
        return found

    return wanted


# -- EAGLE-3 ----------------------------------------------------------------------------------------------------------------


def add_eagle3(folder: Path, out: Path, seed: int = 7, *, width: int = 0, drafted: int = 0, embeds: bool = False, speculators: bool = False,
               scaled: bool = False) -> Reference:
    """Write a head of random weights for a checkpoint; return what it says.

    width: of its rows, if not the model's; drafted: tokens that it drafts, 0: all, by the model's output head; embeds: it has an embedding of its own.
    speculators: in that library's form, with norms before the fusion and the residual; scaled: its rotation is Llama 3's
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    n_layers, target, vocab = main.config.num_hidden_layers, main.config.hidden_size, main.config.vocab_size
    d, f, heads, kv, e, eps, base = width or target, 80, 4, 2, 16, 1e-5, 5e3
    random = torch.Generator().manual_seed(seed)

    def matrix(n: int, k: int) -> Any:
        return 1.5 * torch.randn(n, k, generator=random) / k**0.5

    def vector(n: int) -> Any:
        return 1.0 + 0.3 * torch.randn(n, generator=random)

    w = {"fc": matrix(d, 3 * target), "norm": vector(d), "input_layernorm": vector(d), "hidden_norm": vector(d), "post_attention_layernorm": vector(d),
         "self_attn.q_proj": matrix(heads * e, 2 * d), "self_attn.k_proj": matrix(kv * e, 2 * d), "self_attn.v_proj": matrix(kv * e, 2 * d),
         "self_attn.o_proj": matrix(d, heads * e), "mlp.gate_proj": matrix(f, d), "mlp.up_proj": matrix(f, d), "mlp.down_proj": matrix(d, f)}
    w |= {"lm_head": matrix(drafted, d)} if drafted else {}
    w |= {"embed_tokens": torch.randn(vocab, d, generator=random)} if embeds else {}
    w |= {"input_norm": vector(3 * target)} if speculators else {}
    layer = ("input_layernorm", "hidden_norm", "post_attention_layernorm", "self_attn.", "mlp.")
    prefix = "layers.0." if speculators else "midlayer."
    saved = {(prefix if name.startswith(layer) else "") + name + ".weight": value.contiguous() for name, value in w.items()}
    if drafted:
        tokens = torch.randperm(vocab, generator=random)[:drafted].sort().values
        saved |= {"d2t": tokens - torch.arange(drafted), "t2d": torch.isin(torch.arange(vocab), tokens)}
    own = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": e, "vocab_size": vocab,
           "rms_norm_eps": eps, "rope_theta": base, "max_position_embeddings": 256, "hidden_act": "silu"}
    llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    own |= {"rope_scaling": llama3} if scaled else {}
    more = {"draft_vocab_size": drafted or vocab, "target_hidden_size": target}
    config = {"architectures": ["Eagle3Speculator"], "transformer_layer_config": own, "norm_before_residual": True, "norm_before_fc": True, **more} if speculators else {
        "architectures": ["LlamaForCausalLM"], **own, **more}
    out.mkdir(parents=True)
    save_file(saved, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))

    inv_freq = 1.0 / base ** (torch.arange(0, e, 2) / e)
    if scaled:
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=e, rope_parameters={**llama3, "rope_theta": base}, max_position_embeddings=256), None)

    def norm(x: Any, name: str) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[name]

    def turned(x: Any) -> Any:                               # [n, H, E], row i at position i
        angles = torch.outer(torch.arange(len(x)).float(), inv_freq)[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def layer_of(ids: Any, states: Any) -> Any:
        """States of rows: token i + 1 with the state of row i."""
        emb, g = (w["embed_tokens"] if embeds else main.get_input_embeddings().weight)[ids], norm(states, "hidden_norm")
        x, n = torch.cat([norm(emb, "input_layernorm"), g], -1), len(ids)
        q, k, v = (turned(t) if name != "v" else t for name in "qkv" for t in [(x @ w[f"self_attn.{name}_proj"].T).view(n, -1, e)])
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q, k) / e**0.5 + torch.full((n, n), -torch.inf).triu(1)
        y = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v).reshape(n, -1)
        x = (g if speculators else states) + y @ w["self_attn.o_proj"].T
        z = norm(x, "post_attention_layernorm")
        return x + (torch.nn.functional.silu(z @ w["mlp.gate_proj"].T) * (z @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T

    def wanted(ids: list[int], n: int) -> list[np.ndarray]:
        found = []
        with torch.no_grad():
            seen = main(torch.tensor([ids[:n]]), output_hidden_states=True).hidden_states         # [i]: what layer i takes
            taken = torch.cat([seen[i][0] for i in (2, n_layers // 2, n_layers - 3)], -1)
            states = (norm(taken, "input_norm") if speculators else taken) @ w["fc"].T
            for last in range(n, len(ids)):
                made = layer_of(torch.tensor(ids[1 : last + 1]), states)
                found.append((norm(made[-1], "norm") @ (w["lm_head"] if drafted else main.lm_head.weight).T).numpy())
                states = torch.cat([states, made[-1:]])
        return found

    return wanted


# -- all that there are in files of their own -------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Beside:
    """A head in a file of its own: what adds it, the kind of its model, and the configs of both. told: what the reference is, for docs/models.md."""

    origin: str
    add: Callable[..., Reference]
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    told: str = r"\*"

    def make(self, get: Callable[..., tuple[Path, Path]], folder: Path) -> Made:
        """Write the head's file. get: of a kind and a config, the file of a tiny model and its checkpoint."""
        from converters import convert

        path, checkpoint = get(self.kind, **self.config)
        wanted = self.add(checkpoint, folder / "hf", **self.own)
        base = checkpoint if self.origin == "eagle3" else None
        return Made(path, convert(folder / "hf", folder / "d.gguf", "f32", base=base), self.origin, wanted)


UNSHARED = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
BESIDE = {
    "assistant": Beside("assistant", add_assistant, "gemma4_text", told="Gemma4AssistantForCausalLM"),
    "assistant, no shared caches": Beside("assistant", add_assistant, "gemma4_text", UNSHARED, {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
                                          "Gemma4AssistantForCausalLM"),
    "eagle3": Beside("eagle3", add_eagle3, "llama", {"num_hidden_layers": 7}, {"drafted": 200}),
    "eagle3, as speculators have it": Beside("eagle3", add_eagle3, "qwen3", {"num_hidden_layers": 7}, {
        "width": 64, "drafted": 300, "embeds": True, "speculators": True}),
    "eagle3, the model's tokens": Beside("eagle3", add_eagle3, "llama", {"num_hidden_layers": 7, "tie_word_embeddings": True}, {"scaled": True}),
}
