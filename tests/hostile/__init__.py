"""Random prompts, modes and methods for every family: removing visual tokens must equal hiding them, or be refused."""
