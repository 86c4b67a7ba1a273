"""How is the data made? From text to a tokenized dataset on disk."""
