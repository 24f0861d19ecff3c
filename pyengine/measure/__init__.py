"""How good and how fast: perplexity, tokens per second."""
