"""Open models: one file a family, and the folders, tables and files that they are published as."""
