"""GPT-2 as published: the network, its attention, its loss, its sizes, and how each device computes them."""
