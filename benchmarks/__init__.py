"""Measurements that the documentation shows: `python -m benchmarks.NAME`; each writes a file of docs/results."""
