"""What `bench` and `compare` run: strategies side by side, by time and by the quality of their samples."""
