"""Programs that reproduce tables and figures, and benchmarks. The package never imports them."""
