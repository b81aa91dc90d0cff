"""What is measured: each a program that writes a record of its steps."""
