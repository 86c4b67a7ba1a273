"""How does it learn? Optimizer, step, checkpoints, metrics, and the one training loop."""
