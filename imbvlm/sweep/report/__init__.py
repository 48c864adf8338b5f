"""A sweep's folder as one HTML page that needs no network."""
