"""Measurements of descgen: `python -m bench` lists them."""
