"""Other people's samplers, written over this library's flows: what speed-ups are measured against."""
