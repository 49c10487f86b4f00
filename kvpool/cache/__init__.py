"""What lives in the memory: keys and chains, the index of caches, eviction, leases."""
