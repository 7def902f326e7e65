"""The OpenAI-compatible server: one thread computes, requests come and go around it.

Needs the extra `serve`.
"""
