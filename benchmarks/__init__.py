"""What measures the claims of the README, beside what people use instead."""
