"""The causal transformer that gives a block its parameters."""
