"""Storing a step's tokens: groups that they complete go to pages, and tokens to the window."""
