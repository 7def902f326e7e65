"""LLaVA-Interleave: many images, videos and views in, text out."""
