"""Models of text and image encoders, which make vectors, labels and scores: one module each, found by a file's `general.architecture`."""
