"""The data that a step reads: prepared datasets, tokenizers, conversations, batches."""
