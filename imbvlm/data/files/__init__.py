"""Bytes from local disks and object stores."""
