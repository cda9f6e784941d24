"""Sampling: one `Pipeline` for runs trained here, converted folders, and runs that were finetuned from one."""
