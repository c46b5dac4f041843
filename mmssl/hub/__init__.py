"""Model folders that others can load."""
