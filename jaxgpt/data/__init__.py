"""What does it read? From text to a token stream on disk, and from that to the batch of a step."""
