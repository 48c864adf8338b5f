"""What a sweep needs and takes, before it starts."""
