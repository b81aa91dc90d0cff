"""Strict import and export of Hugging Face directories and GGUF files."""
