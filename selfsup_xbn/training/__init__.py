"""Training of runs."""
