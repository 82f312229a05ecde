"""Configuration of a run: sections, the combinations that cannot work, the YAML file.

Knows settings; does not import torch.
"""
