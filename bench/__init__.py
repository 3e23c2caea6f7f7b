"""What the project measures, and how: `python -m bench` runs the suite, `python -m bench.gpu` all that needs a GPU."""
