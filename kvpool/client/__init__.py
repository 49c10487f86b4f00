"""The client of a pool in a model's process."""
