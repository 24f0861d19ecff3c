"""What a model runs: its programs' inputs, declared and filled."""
