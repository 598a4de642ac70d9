"""Data sets that ship inside packages, split by who made the data. TensorFlow is never imported here."""
