"""The operators as Triton kernels, for GPUs where the compiled library is not; see _ops.py.

Importing this package imports triton. Formulas and names are those of csrc/cuda.

- position.py: a position's loss and gradient from sums over its classes.
- loss.py: the kernels of rows and class planes; row.py and dense.py are their operators.
- finish.py: what is known when all programs are done.
- launch.py: tile sizes, grids.
"""
