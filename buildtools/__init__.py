"""Building and shipping: setup.py, releases and CI call it; it is not installed."""
