"""Stand-in of mmsegmentation 1.2.2."""
