"""What one optimizer step needs."""
