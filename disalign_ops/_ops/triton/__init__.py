"""The operators as Triton kernels, for GPUs where the compiled library is not; see registration.py.

Importing the modules of this package imports triton. Formulas and names are those of csrc/cuda.

- position.py: a position's loss and gradient from sums over its classes.
- loss.py, calibrate.py: the kernels of rows and class planes; operators.py launches them.
- upsample.py, upsample_backward.py: those of the upsampled loss; upsample_operators.py.
- finish.py: what is known when all programs are done.
- call.py: arguments, memory and sums of every operator. launch.py: tiles, grids, the launch.
"""
