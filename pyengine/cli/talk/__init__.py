"""A conversation at a terminal: `chat` its loop, the rest what that is made of."""
