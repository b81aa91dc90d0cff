"""A run: its directory and journal, what makes it the same again, and its replica in MLflow."""
