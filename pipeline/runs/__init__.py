"""A run: its directory, its journal, what identifies it, and its replica in MLflow."""
