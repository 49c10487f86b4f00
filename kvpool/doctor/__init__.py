"""What is wrong with this system, as a pool needs it, and how to mend it."""
