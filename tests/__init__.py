"""The tests; their shared helpers are in `tests.helpers`."""
