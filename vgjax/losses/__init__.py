"""One loss term a file."""
