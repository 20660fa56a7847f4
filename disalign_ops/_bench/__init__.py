"""Times and memory of a loss beside its peers, for `python -m disalign_ops bench`."""
