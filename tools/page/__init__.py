"""The page that solves in a browser."""
