"""Numbers of a file that no model can have: each is refused when it is loaded, with the file and the key as it stands there."""

from __future__ import annotations

import pytest

import foreign
import pyengine as pe
from pyengine.errors import InvalidModelError

NAN, INF, MOST = float("nan"), float("inf"), 2**32 - 1
NUMBERS = {
    "llama": (("llama.rope.freq_base", (0.0, -1e4, NAN, INF)), ("llama.attention.layer_norm_rms_epsilon", (0.0, -1e-5, NAN)),
              ("llama.attention.head_count", (0, MOST)), ("llama.attention.head_count_kv", (0, MOST)), ("llama.block_count", (0, MOST)),
              ("llama.embedding_length", (0, MOST)), ("llama.feed_forward_length", (0, MOST)), ("llama.context_length", (0, MOST)),
              ("llama.rope.dimension_count", (0, 7, MOST))),
    "ministral3": (("mistral3.rope.freq_base", (0.0, 1.0)), ("mistral3.rope.scaling.factor", (-1.0, NAN)),
                   ("mistral3.rope.scaling.yarn_beta_fast", (0.0, -1.0)), ("mistral3.rope.scaling.yarn_beta_slow", (0.0,)),
                   ("mistral3.rope.scaling.attn_factor", (0.0, -1.0, INF))),
    "granitemoe": (("granitemoe.expert_used_count", (0, 100, MOST)), ("granitemoe.expert_count", (0, MOST))),
    "gemma3": (("gemma3.rope.freq_base_swa", (0.0,)), ("clip.vision.attention.layer_norm_epsilon", (0.0, NAN)),
               ("clip.vision.image_size", (0, 2**31 - 1)), ("clip.vision.attention.head_count", (0, 5)), ("clip.vision.image_std", (0.0, -1.0)),
               ("clip.vision.image_mean", (NAN,))),
    "internvl": (("clip.vision.preproc_max_tiles", (0, 2**31 - 1)),),
    "aria": (("clip.vision.projector.patch_to_query", (0, -1)),),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_impossible_numbers_are_refused_by_their_key(tiny_gguf, tmp_path, kind: str) -> None:
    path = tiny_gguf(kind)[0]
    pe.plan(path, n_ctx=64, device="cpu")
    for key, values in NUMBERS[kind]:
        for value in values:
            file = foreign.altered(path, tmp_path / "n.gguf", key, value)
            with pytest.raises(InvalidModelError) as error:
                pe.plan(file, n_ctx=64, device="cpu")
            assert str(error.value).startswith(f"{file}: {key} is "), (key, value)
