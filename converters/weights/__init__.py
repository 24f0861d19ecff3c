"""Real models that the demo and the tests use: `python -m converters.weights FOLDER` fetches them. See `__main__`."""
