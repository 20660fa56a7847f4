"""Stand-in of detectron2 0.6."""
