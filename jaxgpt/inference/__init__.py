"""Text from a trained model: sampling rules, decoding, the engine of the server, prompts and conversations."""
