"""Cluster decisions: the pool's state, placement, statistics. Pure: no Ray, no clock."""
