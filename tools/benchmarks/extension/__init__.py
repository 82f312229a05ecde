"""A small model trained from scratch and its context extended, with dense attention and with DashAttention."""
