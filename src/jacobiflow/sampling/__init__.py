"""Samples of a flow, with their certificates and densities."""
