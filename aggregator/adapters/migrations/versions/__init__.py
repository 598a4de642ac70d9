"""One file a migration: NNNN_what.py, in one line of numbers."""
