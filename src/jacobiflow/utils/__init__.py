"""Checks of arguments, files, JSON and timings, for all folders of the package."""
