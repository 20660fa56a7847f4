"""Configurations for other frameworks, with the numbers of the recipes."""
