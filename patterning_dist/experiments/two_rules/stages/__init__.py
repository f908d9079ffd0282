"""The stages of the parentheses experiment; each reads and writes files of the run directory."""
