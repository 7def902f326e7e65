"""Measuring answers: tasks and scores over anything that answers. Knows nothing of how an answer
was made.
"""
