"""From a pretrained encoder and labels to a model for a task, by the Trainer of transformers as it is."""
