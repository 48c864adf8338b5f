"""Pure functions on class counts and logits."""
