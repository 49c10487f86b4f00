"""kvpool: one elastic pool of KV-cache memory for many models on a Ray cluster."""

__version__ = "0.1.0"
