"""What a sweep's folder holds, and what is selected from it."""
