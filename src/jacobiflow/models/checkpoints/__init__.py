"""Model folders, and state dicts of the original codes."""
