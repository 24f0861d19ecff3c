"""What it takes: settings, counts, placement, plans."""
