"""InternLM 2 and 2.5 text decoders: llama's block; q, k and v lie together in checkpoints, and apart in GGUF files.

Paper arXiv:2403.17297. Follows the authors' `modeling_internlm2.py`. Rows of q and k are permuted as in llama's files.
"""

from __future__ import annotations

from pyengine.models import llama


class Model(llama.Model):
    """An internlm2 decoder: llama's."""
