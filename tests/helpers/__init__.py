"""Oracles, invented flows and other helpers that several tests share."""
