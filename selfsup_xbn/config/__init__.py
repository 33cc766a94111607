"""Configuration of runs."""
