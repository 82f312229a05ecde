"""Models of Hugging Face: their configuration, the names and shapes of their tensors, their files.

Knows files and tensors. Does not import Megatron-core, and does not know ranks.
"""
