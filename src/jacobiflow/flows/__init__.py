"""Flows, the blocks they are made of, and the files they are stored in."""
