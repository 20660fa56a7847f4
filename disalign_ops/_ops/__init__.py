"""The operators: schemas, layouts, autograd, backends, and the formulas in PyTorch."""
