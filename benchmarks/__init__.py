"""Measurements that the documentation quotes: `python -m benchmarks.NAME`, each writes a file of docs/results."""
