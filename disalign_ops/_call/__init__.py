"""The one way in: checks of arguments, and what the public functions share."""
