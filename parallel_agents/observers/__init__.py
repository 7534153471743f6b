"""Observers that come with the library; each is imported by its own path."""
