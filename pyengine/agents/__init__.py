"""Models that use a computer: a screen is seen, actions are checked, done and written down."""
