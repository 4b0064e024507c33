"""What distillation is made of: losses, layer maps, what a teacher says, and the cache that keeps it."""
