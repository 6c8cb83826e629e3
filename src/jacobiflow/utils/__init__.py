"""What all folders share: checks of arguments, files, JSON, timings."""
