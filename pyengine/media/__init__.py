"""What is seen and heard: sources to pixels and frames."""
