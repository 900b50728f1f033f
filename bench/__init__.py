"""Measurements of what the router costs, beside its peers. See README.md in this folder."""
