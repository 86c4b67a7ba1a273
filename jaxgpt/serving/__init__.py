"""Who may ask, and how? The HTTP interface of a model."""
