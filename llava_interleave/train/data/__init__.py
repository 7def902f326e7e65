"""Training data: forms of samples, data sets, validation, prompts and packed batches."""
