"""The label that data, losses and metrics agree to leave out."""

IGNORE = -1
"""The label of a position that is not counted: special token, continuation piece, padding."""
