"""The Ray actors: thin shells that carry decisions out."""
