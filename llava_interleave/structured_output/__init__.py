"""Structured output: answers limited to JSON, a schema, a regular expression or choices."""
