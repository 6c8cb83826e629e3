"""The blocks of flows: their protocol, the order of tokens, guidance."""
