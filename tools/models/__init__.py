"""The bundled models, their data, and the networks that score them."""
