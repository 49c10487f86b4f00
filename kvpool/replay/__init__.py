"""The main job: model actors replay a trace against a pool and verify every byte that they hit."""
