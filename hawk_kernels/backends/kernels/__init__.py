"""The operators in Triton, one file for each; a file is imported when its operator is first called on a GPU."""
