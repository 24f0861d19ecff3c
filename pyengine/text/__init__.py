"""Text to ids to text: vocabularies, tokenizers, sampling."""
