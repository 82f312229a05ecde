"""Warp-specialised kernels for Hopper, in Gluon: the stages that gain from them, with the results of `triton`.

Imported only where `dash_kernels.support` selects them: not every Triton release has Gluon.
"""
