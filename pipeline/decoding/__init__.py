"""Text from a model: cached, batched, sampled or searched."""
