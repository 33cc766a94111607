"""Methods: what a training step is. Each reads like its paper's algorithm."""
