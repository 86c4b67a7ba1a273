"""jaxgpt: from raw text to a served GPT-2 on CPU, GPU or TPU. Nothing is imported here."""

__version__ = "0.1.0"
