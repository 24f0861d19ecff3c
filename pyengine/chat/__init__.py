"""Messages to text: templates, and what answers name."""
