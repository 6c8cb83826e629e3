"""The site of docs/zensical.toml."""
