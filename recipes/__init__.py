"""Runnable recipes, one a task and data set: see docs/recipes.md. Not part of the wheel."""
