"""Speed and memory of disalign_ops beside its peers: `python -m benchmarks.run --help`."""
