"""Checkpoints with a head that predicts further tokens (MTP): random ones made by transformers' `MtpModel`, under the names of published ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {"layers.0.eh_proj.": "mtp.fc.", "layers.0.enorm.": "mtp.pre_fc_norm_embedding.", "layers.0.hnorm.": "mtp.pre_fc_norm_hidden.",
         "layers.0.post_norm.": "mtp.norm.", "layers.0.mtp_block.": "mtp.layers.0."}


def add_head(folder: Path, out: Path, seed: int = 3, spread: float = 0.05) -> tuple[Any, Any]:
    """Write a text checkpoint again, with a head of random weights; return the model of transformers and its head."""
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
    return main, head


def reference(main: Any, head: Any, ids: list[int], n: int) -> list[np.ndarray]:
    """Return the head's logits behind each of the last tokens of `ids`, of which the model has read the first n: it goes on with its own states."""
    import torch

    with torch.no_grad():
        hidden = main.model(torch.tensor([ids[:n]])).last_hidden_state
        found = []
        for last in range(n, len(ids)):
            at = torch.arange(1, last + 1)[None]
            own = head.forward_layer(0, hidden, at, None, input_ids=torch.tensor([ids[1 : last + 1]]))
            found.append(main.lm_head(own[0, -1]).numpy())
            hidden = torch.cat([hidden, own[:, -1:]], dim=1)
    return found
