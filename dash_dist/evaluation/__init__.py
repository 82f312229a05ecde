"""Synthetic long-context tasks on a trained model: samples, greedy decoding, scores, and the command `evaluate`.

Knows texts, tokenizers and the `Predictor` protocol. Does not know how a model is trained.
"""
