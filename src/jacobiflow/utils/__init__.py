"""What all rooms share: checks of arguments, files, JSON, timings."""
