"""Running: load, schedule, generate."""
