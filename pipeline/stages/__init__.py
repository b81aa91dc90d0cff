"""Commands that keep a run, and chains of them."""
