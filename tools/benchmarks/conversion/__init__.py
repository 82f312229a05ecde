"""Ways to convert a dense model to DashAttention, compared on the same batches."""
