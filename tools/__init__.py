"""What makes the documentation, its pictures, the bundled models, and the page that solves in a browser."""
