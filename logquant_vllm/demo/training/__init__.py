"""How the demo model was trained: not part of the wheel."""
