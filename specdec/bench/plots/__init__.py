"""Plots drawn as SVG: pure functions from data to a string that needs nothing else, readable in light and dark."""
