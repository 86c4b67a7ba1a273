"""How good is a model? Perplexity, benchmark tasks, the harness, figures of generated texts."""
