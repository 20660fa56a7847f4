"""What recipes share: numbers with sources, processes, checkpoints, the log."""
