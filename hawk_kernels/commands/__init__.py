"""The commands of `hawk-kernels`, one module each, and what they share.

`guard` runs a command and turns whatever can go wrong into one line and an exit status; `options` holds the argument
types. `demo` and `tune` are modules of the package itself. Nothing here imports torch before a command needs it, so
that `info` runs where torch or transformers is broken.
"""
