"""Makes prepared datasets from text and conversations: sources, cleaning, splits, tokens, reports."""
