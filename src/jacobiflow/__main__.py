"""`python -m jacobiflow`."""

from jacobiflow.cli import main

main()
