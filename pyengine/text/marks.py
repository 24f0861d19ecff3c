"""Noncharacters that say what a token was in text that was decoded, or is to be tokenized; no text holds them (Unicode 16, 23.7)."""

MARK = "\ufdd0"                       # stands before the text of a token that is a mark
GUARD = "\ufdd1"                      # stands within the text of such a token where it is none
