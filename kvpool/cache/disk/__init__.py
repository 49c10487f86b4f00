"""The disk tier of one device: sealed caches as checksummed files under an ``fsspec`` URL."""
