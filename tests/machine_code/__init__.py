"""Counts the warp instructions of kernels in their machine code: disassembly, walk, row kernels."""
