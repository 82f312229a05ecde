"""Import of a pretrained model: its checks, its files and its parity with transformers."""
