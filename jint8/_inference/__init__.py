"""Loaded models at work: text, vectors, scores, and whether they fit."""
