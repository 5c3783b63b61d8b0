"""Adapters that let other libraries learn from the token rewards; each sub-module imports its own library."""
