"""The shared transformer and what surrounds it. Imports only torch, transformers and each other: export flattens it."""
