"""Backends: how scores and selections are computed. `api` validates, `ops` registers, these compute.

Empty on purpose: the submodules are called `torch` and `triton`, and would hide the packages of those names here.
"""
