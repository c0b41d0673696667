"""A small language model trained for this project, and the tasks that show what a cache format costs it."""
