"""The compressors: what they have in common, and a file for each kind."""
