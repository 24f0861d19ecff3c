"""Replies of models, read as they come: text, thinking and tool calls, each family's way of writing them, and grammars of calls."""
