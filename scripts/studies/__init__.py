"""Studies of the methods on real models and data; each goes on where it was cut off and writes results to a file."""
