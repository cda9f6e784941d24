"""One file = one model: its modules and its SIZES."""
