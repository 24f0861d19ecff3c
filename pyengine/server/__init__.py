"""The HTTP server: OpenAI's and Ollama's interfaces over the models of one process. `app.application` makes it, `app.serve` runs it."""
