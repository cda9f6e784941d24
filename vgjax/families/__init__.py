"""How an open model is used: its prompt template, encoders, schedule, guidance and defaults; one file a family."""
