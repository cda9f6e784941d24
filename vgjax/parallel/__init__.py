"""Layouts, shardings, several processes."""
