"""The shapes of each op, and who competes there."""
