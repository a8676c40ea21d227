"""Decides, never acts: values in, Decision out. See router/README.md for the rules in order."""
