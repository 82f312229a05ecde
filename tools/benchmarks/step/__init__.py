"""Whole training steps, by setting and beside transformers."""
