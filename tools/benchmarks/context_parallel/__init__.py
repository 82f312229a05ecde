"""Context-parallel attention against dense ring attention: ranks, timing, overlap, predictions, tables, plot."""
