"""Builds the site of zensical.toml: `python -m benchmarks.website`, or `make docs`."""
