"""A model behind an HTTP port."""
