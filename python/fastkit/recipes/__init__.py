"""Published experiments, each run by one command on real data."""
