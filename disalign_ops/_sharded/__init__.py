"""Rows whose classes are divided: over memory (chunks), over processes (ranks)."""
