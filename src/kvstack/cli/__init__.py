"""The `kvstack` command: one command is one module."""
