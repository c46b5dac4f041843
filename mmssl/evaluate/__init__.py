"""Whether an encoder is good: features, k-NN, linear classifiers, collapse."""
