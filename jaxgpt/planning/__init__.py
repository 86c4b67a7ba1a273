"""What will it cost? The TPU compiler asked ahead of time, on a machine without a TPU."""
