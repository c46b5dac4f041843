"""The fault campaign: what is done to runs on purpose, and whether anything was lost."""
