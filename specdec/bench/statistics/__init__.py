"""Numbers of a benchmark run: pure functions from records to plain values, one quantity a file."""
