"""Parts of models. Each binds its weights by name and shape; calling it adds nodes to a graph."""

from pyengine.nn.layers import Embedding, Experts, LayerNorm, Linear, PatchEmbedding, RMSNorm

__all__ = ["Embedding", "Experts", "LayerNorm", "Linear", "PatchEmbedding", "RMSNorm"]
