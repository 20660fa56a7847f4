"""Stand-in of mmdetection 3.3.0."""
