"""What lies on disk: GGUF files, the names and numbers in them, and where models are kept."""
