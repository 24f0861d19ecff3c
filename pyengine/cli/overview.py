"""What `pyengine-run --help` says of the commands."""

from __future__ import annotations

COMMANDS = """[bold]Commands[/bold]

pyengine-run MODEL: a conversation; MODEL PROMPT: one answer (`run` and `chat` may stand before them)

pyengine-run chat --server URL: a conversation with a model of a running server

pyengine-run pull NAME: fetch a model from Hugging Face or Ollama's registry

pyengine-run plan MODEL: the memory it needs, by device and purpose

pyengine-run bench MODEL: tokens per second of prompts and generation

pyengine-run perplexity MODEL -f FILE: how well it predicts a text

pyengine-run classify MODEL --image FILE LABEL...: how probable labels are for a picture

pyengine-run index FOLDER --model MODEL: make pictures searchable; search QUERY: find them

pyengine-run serve [MODEL...]: answers over HTTP

pyengine-run ps: the models that a server has in memory

pyengine-run stop MODEL: has a server unload one

pyengine-run show MODEL: what its file says

pyengine-run graph MODEL: the graph of its step

pyengine-run attention MODEL --image FILE --png OUT.png: where its queries look in a picture

pyengine-run embed MODEL TEXT...: vectors of texts and pictures

pyengine-run list: the models on this machine

pyengine-run hardware: what this machine has, and what of it can be used

Each takes --help. MODEL is a GGUF file, or a name that `list` shows, or the beginning of just one of them."""
