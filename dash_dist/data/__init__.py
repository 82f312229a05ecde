"""Documents, tokenizers, packing, and the position in the data.

Knows its data-parallel index; does not know other ranks or models.
"""
