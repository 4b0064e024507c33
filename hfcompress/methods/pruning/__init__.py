"""What structured pruning is made of: units, their importance, the search for a mask, and reconstruction."""
