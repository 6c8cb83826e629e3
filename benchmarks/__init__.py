"""Measurements that the documentation shows: `python -m benchmarks.NAME`. Each writes a file of docs/results.

A benchmark that was stopped goes on when it is started again.
"""
