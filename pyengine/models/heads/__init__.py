"""Heads that draft for a decoder from files of their own: one module each, found by the name that a file gives as general.architecture."""
