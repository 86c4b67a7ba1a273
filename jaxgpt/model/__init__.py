"""What does it compute? GPT-2 as published: the network, its attention, its loss, its sizes."""
