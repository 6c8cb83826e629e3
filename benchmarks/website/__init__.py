"""Builds the site of zensical.toml: `PYTHONPATH=benchmarks python -m website`, or `make docs`."""
