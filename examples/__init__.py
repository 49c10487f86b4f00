"""Applications to start from. Each file says how to run it; all run on random weights and download nothing."""
