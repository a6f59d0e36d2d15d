"""The Triton kernels of in2nect, importable as `in2nect.kernels`: one file an operator, named after it.

They need torch and Triton alone, so that a bare checkout on a machine with a GPU can run them.
"""
