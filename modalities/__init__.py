"""What differs between kinds of data: one folder each, the same files in each."""
