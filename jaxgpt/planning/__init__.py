"""Answers what a training will cost, by the TPU compiler on a machine without a TPU."""
