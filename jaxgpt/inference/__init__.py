"""What comes next? Sampling rules and the jitted decoding loop."""
