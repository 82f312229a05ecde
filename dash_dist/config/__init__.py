"""Configuration of a run: its sections, the refused combinations, the YAML file.

Knows settings; does not know torch, which it never imports.
"""
