"""One device's memory: addresses, pages, mapping, and handing pages to other processes."""
