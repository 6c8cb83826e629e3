"""Timings of samplers beside those of the original codes."""
